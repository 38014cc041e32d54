"""The models, registered with the Auto classes of `transformers`."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, configuration_utils
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from everlong.models.cache import MemoryCache
from everlong.models.configuration_lm2 import LM2Config
from everlong.models.configuration_rmt import RMTConfig
from everlong.models.configuration_titans import LAYER_TYPES, TitansConfig
from everlong.models.gated_deltanet import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
from everlong.models.modeling_lm2 import LM2ForCausalLM, LM2Model
from everlong.models.modeling_rmt import RMTForCausalLM, RMTModel
from everlong.models.modeling_titans import TitansForCausalLM, TitansModel, TitansPreTrainedModel
from everlong.models.retrieval import Retrieval, RetrievalLM
from everlong.models.sizes import count_parameters, model_config

# Some parts of transformers (the Trainer when it resumes) read any config.json by the base class,
# which refuses names of layers that it does not know.
configuration_utils.ALLOWED_ATTN_LAYER_TYPES = (
    *configuration_utils.ALLOWED_ATTN_LAYER_TYPES,
    *(name for name in LAYER_TYPES if name not in configuration_utils.ALLOWED_ATTN_LAYER_TYPES),
)
# The Trainer shifts the labels that it smooths for models that it knows by these names alone.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.update(
    titans="TitansForCausalLM",
    lm2="LM2ForCausalLM",
    rmt="RMTForCausalLM",
    gated_deltanet="GatedDeltaNetForCausalLM",
)
AutoConfig.register("titans", TitansConfig)
AutoModel.register(TitansConfig, TitansModel)
AutoModelForCausalLM.register(TitansConfig, TitansForCausalLM)
AutoConfig.register("lm2", LM2Config)
AutoModel.register(LM2Config, LM2Model)
AutoModelForCausalLM.register(LM2Config, LM2ForCausalLM)
AutoConfig.register("rmt", RMTConfig)
AutoModel.register(RMTConfig, RMTModel)
AutoModelForCausalLM.register(RMTConfig, RMTForCausalLM)
AutoConfig.register("gated_deltanet", GatedDeltaNetConfig)
AutoModelForCausalLM.register(GatedDeltaNetConfig, GatedDeltaNetForCausalLM)

__all__ = [
    "GatedDeltaNetConfig",
    "GatedDeltaNetForCausalLM",
    "LM2Config",
    "LM2ForCausalLM",
    "LM2Model",
    "MemoryCache",
    "RMTConfig",
    "RMTForCausalLM",
    "RMTModel",
    "Retrieval",
    "RetrievalLM",
    "TitansConfig",
    "TitansForCausalLM",
    "TitansModel",
    "TitansPreTrainedModel",
    "count_parameters",
    "model_config",
]

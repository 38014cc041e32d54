"""The models, registered with the Auto classes of `transformers`."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from everlong.models.cache import TitansCache
from everlong.models.configuration_titans import TitansConfig
from everlong.models.modeling_titans import TitansForCausalLM, TitansModel, TitansPreTrainedModel

AutoConfig.register("titans", TitansConfig)
AutoModel.register(TitansConfig, TitansModel)
AutoModelForCausalLM.register(TitansConfig, TitansForCausalLM)

__all__ = [
    "TitansCache",
    "TitansConfig",
    "TitansForCausalLM",
    "TitansModel",
    "TitansPreTrainedModel",
]

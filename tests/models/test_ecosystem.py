"""What people do with a model of `transformers`: each works for every kind of layer."""

import copy
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

from everlong import NeuralMemoryState, TitansConfig, TitansForCausalLM
from everlong.data import byte_tokenizer
from everlong.models import MemoryCache
from everlong.models.modeling_titans import TitansLayer
from everlong.models.presets import PRESETS
from everlong.ops import backends, use_backend
from numerics import assert_close
from subjects import CHUNK, SEGMENT, VOCABULARY, lm2, rmt, titans

KINDS = ["lmm", "mac", "mag", "mal"]  # the blocks of Titans
OTHERS = {
    "lm2": partial(lm2, num_memory_slots=5),
    "lm2-positions": partial(lm2, memory_addressing="positions"),
    "lm2-released": partial(lm2, memory_addressing="released"),
    "rmt": rmt,
    "rmt-gpt2": partial(rmt, model_type="gpt2"),
}
EVERY = pytest.mark.parametrize("kind", KINDS)
ANY = pytest.mark.parametrize("kind", [*KINDS, *OTHERS])


def build(kind, *more, **options):
    return (OTHERS[kind](**options) if kind in OTHERS else titans(kind, *more, **options))()


def make(kind, **options):
    torch.manual_seed(0)
    return build(kind, "sliding_attention", **options).double().eval()


def precision(kind):
    """Llama's own norms and angles are float32, whatever the parameters are."""
    return torch.float32 if kind in OTHERS else torch.float64


def text(batch=2, tokens=2 * SEGMENT + 3):
    return torch.randint(1, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(1))


@ANY
def test_unequal_prompts_with_beams(kind):
    """Eight prompts padded on the left, four beams, several segments: the texts of each alone."""
    model = make(kind, initializer_range=0.5)
    lengths = [1, 3, CHUNK, SEGMENT, SEGMENT + 1, 2 * SEGMENT, 2 * SEGMENT + 5, 3 * SEGMENT]
    prompts = [text(1, n)[0] for n in lengths]
    width = max(lengths)
    ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0)) for p in prompts])
    mask = torch.stack(
        [torch.nn.functional.pad(torch.ones_like(p), (width - len(p), 0)) for p in prompts]
    )
    asked = {"max_new_tokens": SEGMENT + 3, "num_beams": 4, "do_sample": False, "pad_token_id": 0}
    got = model.generate(ids, attention_mask=mask, **asked)[:, width:]
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)).long(), **asked)
        assert torch.equal(got[row], alone[0, len(prompt) :]), f"prompt of {len(prompt)} tokens"


def test_right_padding_is_refused_by_generate():
    model, ids = make("lmm"), text()
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="pad on the left"):
        model.generate(ids, attention_mask=mask, max_new_tokens=2)


@ANY
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate_from_a_cache_that_was_saved(kind, options, tmp_path):
    model, ids = make(kind, initializer_range=0.5), text()
    asked = {"max_new_tokens": SEGMENT, "do_sample": False, "pad_token_id": 0, **options}
    want = model.generate(ids, attention_mask=torch.ones_like(ids), **asked)
    with torch.no_grad():
        model(ids[:, :7], use_cache=True).past_key_values.save(tmp_path / "memory.safetensors")
    cache = MemoryCache.load(tmp_path / "memory.safetensors")
    for _ in range(2):  # the cache stays as it is
        got = model.generate_from(cache, ids[:, 7:], **asked)
        assert torch.equal(got, want[:, 7:])


@ANY
def test_one_memory_serves_many_questions(kind):
    model, ids = make(kind, initializer_range=0.5), text(1)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    questions, mask = text(3, 5), torch.ones(3, 5).long()
    mask[1, :2] = 0
    asked = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    got = model.generate_from(cache, questions, mask, **asked)
    for row in range(3):
        whole = torch.cat([ids, questions[row : row + 1, mask[row].bool()]], 1)
        want = model.generate(whole, attention_mask=torch.ones_like(whole), **asked)
        assert torch.equal(got[row, 5:], want[0, whole.shape[1] :])


def test_several_answers_to_one_question():
    model, ids = make("lmm", initializer_range=0.5), text(1)
    with torch.no_grad():
        cache = model(ids[:, :7], use_cache=True).past_key_values
    asked = {"max_new_tokens": 9, "pad_token_id": 0}
    want = model.generate_from(cache, ids[:, 7:], do_sample=False, **asked)
    again = {"do_sample": True, "top_k": 1, "num_return_sequences": 3}
    got = model.generate_from(cache, ids[:, 7:], **again, **asked)
    assert torch.equal(got, want.expand(3, -1))


def test_files_of_caches(tmp_path):
    cache = make("mac")(text(), use_cache=True).past_key_values
    cache.layers[0].state.save(tmp_path / "layer.safetensors")
    with pytest.raises(ValueError, match="holds the state of one layer"):
        MemoryCache.load(tmp_path / "layer.safetensors")
    cache.save(tmp_path / "memory.safetensors")
    with pytest.raises(ValueError, match="holds the cache of a model, not a NeuralMemoryState"):
        NeuralMemoryState.load(tmp_path / "memory.safetensors")
    (tmp_path / "memory.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        MemoryCache.load(tmp_path / "memory.safetensors")
    with pytest.raises(FileNotFoundError):
        MemoryCache.load(tmp_path / "none.safetensors")


@EVERY
def test_a_cache_of_another_model_is_refused(kind):
    cache = make(kind)(text(), use_cache=True).past_key_values
    other = make({"lmm": "sliding_attention", "mac": "mag", "mag": "mac", "mal": "lmm"}[kind])
    with pytest.raises(ValueError, match="belongs to another"):
        other(text(), past_key_values=cache)


@ANY
def test_decoding_keeps_its_size(kind):
    """However much was read, a state has the tensors of a state."""
    model = make(kind)
    sizes = []
    for tokens in (4 * SEGMENT, 40 * SEGMENT):
        cache = model(text(1, tokens), use_cache=True).past_key_values
        sizes.append([x.untyped_storage().nbytes() for x in leaves(cache)])
    assert sizes[0] == sizes[1]


def leaves(cache):
    return [x for layer in cache.layers for x in layer.state.tensors().values()]


@ANY
def test_pipeline(kind, tmp_path):
    model = build(kind, vocab_size=257)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), device="cpu")
    texts = ["A memory", "that learns while it reads"]
    out = generator(texts, max_new_tokens=4, do_sample=False, batch_size=2, return_full_text=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(out) == 2
    assert all(isinstance(each[0]["generated_text"], str) for each in out)
    card = (tmp_path / "README.md").read_text()
    # Nothing else can tell someone whose transformers says that it does not know the model.
    assert "library_name: everlong" in card
    lines = card.split("---\n")[2].split("\n\n")
    assert "`import everlong` before" in lines[1]
    assert card.index("import everlong  #") < card.index(".from_pretrained(folder)")
    assert f"1 {kind}" in card or kind in OTHERS
    assert type(model) is type(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert tokenizer.vocab_size


@ANY
def test_plain_trainer_trains_and_resumes(kind, tmp_path):
    """transformers' own Trainer, with gradient checkpointing and accumulation."""

    def run(steps, **resume):
        torch.manual_seed(0)
        ids = text(8)
        rows = [{"input_ids": row, "labels": row} for row in ids]
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            activation_checkpointing=True,
            save_steps=2,
            logging_steps=1,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(build(kind), arguments, train_dataset=rows)
        trainer.train(**resume)
        return trainer.model.state_dict()

    run(2)
    resumed = run(4, resume_from_checkpoint=True)
    for path in tmp_path.iterdir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    for name, weight in run(4).items():
        assert torch.equal(resumed[name], weight), name


@ANY
def test_gradient_checkpointing_changes_nothing(kind):
    model, ids, grads = make(kind).train(), text(), []
    for enabled in (False, True):
        if enabled:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name in grads[0]:
        assert_close(name, grads[1][name], grads[0][name], precision(kind))


@ANY
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_gradient_checkpointing_computes_again_by_the_same_back_end(kind, backend):
    """Of the forward pass, whatever is in force in the backward pass."""
    if backend not in backends():
        pytest.skip("no compiler here")
    model, ids, grads = make(kind).train(), text(), []
    for enabled in (False, True):
        if enabled:
            model.activation_checkpointing_enable()
        model.zero_grad()
        with use_backend(backend):
            loss = model(ids, labels=ids).loss
        with use_backend({"eager": "native", "native": "eager"}[backend]):
            loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name in grads[0]:
        assert_close(name, grads[1][name], grads[0][name], precision(kind))


def test_gradient_checkpointing_holds_a_segment_at_a_time(monkeypatch):
    read, plain = [], TitansLayer._read
    monkeypatch.setattr(
        TitansLayer, "_read", lambda self, x, *rest: (read.append(x.shape[1]), plain(self, x, *rest))[1]
    )
    model, ids = titans("lmm", "full_attention")().train(), text(2, 2 * SEGMENT + 3)
    model(ids, labels=ids).loss.backward()
    assert set(read) == {2 * SEGMENT + 3}
    model.activation_checkpointing_enable()
    read.clear()
    model(ids, labels=ids).loss.backward()
    # The first layer in pieces, forward, and once more for its inputs and its gradients.
    assert read.count(SEGMENT) == 3 * 2
    assert read.count(2 * SEGMENT + 3) == 2


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(ValueError, match="use_reentrant"):
        make("lmm").activation_checkpointing_enable({"use_reentrant": True})


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(kind, dtype):
    """Under autocast and with half parameters: states in float32, logits near those of float32."""
    model, ids = make(kind).float(), text()
    want = model(ids, labels=ids)
    with torch.autocast("cpu", dtype):
        out = model(ids, labels=ids, use_cache=True)
        out.loss.backward()
        model(ids, past_key_values=out.past_key_values)
    # Eight numbers of eight bits a row: some percent of noise, and no more.
    assert (out.logits - want.logits).norm() < 0.1 * want.logits.norm()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    half = copy.deepcopy(model).to(dtype)
    cache = half(ids, use_cache=True).past_key_values
    memory = cache.layers[0].state
    memory = memory if kind == "lmm" else memory.memory
    assert memory.dtype == torch.float32
    logits = half(ids, past_key_values=cache).logits
    assert logits.dtype == dtype
    assert logits.isfinite().all()


@EVERY
def test_files_in_shards_and_device_maps(kind, tmp_path):
    model, ids = make(kind), text()
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with torch.no_grad():
        want = model(ids).logits
        ends = dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), "cpu")
        for places in ("cpu", {**ends, "model.layers.0": "disk", "model.layers.1": "cpu"}):
            loaded = AutoModelForCausalLM.from_pretrained(
                tmp_path, dtype=torch.float64, device_map=places, offload_folder=tmp_path / "aside"
            )
            out = loaded(ids[:, :5], use_cache=True)
            # The second row starts anew.
            starts = torch.tensor([[1] * 14, [0, *[1] * 13]])
            rest = loaded(ids[:, 5:], position_ids=starts, past_key_values=out.past_key_values)
            assert_close("logits", torch.cat([out.logits, rest.logits], 1)[0], want[0])
            assert_close("anew", rest.logits[1], model(ids[1:, 5:]).logits[0])


@ANY
def test_cut_gradients(kind):
    """backprop_segments: outputs stay, gradients stop at the borders, calls can be stepped."""
    ids = text(2, 4 * SEGMENT)
    model = make(kind)
    cut = make(kind, backprop_segments=2).train()
    cut.load_state_dict(model.state_dict())
    assert_close("logits", cut(ids).logits, model(ids).logits, precision(kind))

    def reached(model):
        x = model.model.embed_tokens(ids).detach().requires_grad_()
        logits = model(inputs_embeds=x).logits
        logits[:, -1].square().sum().backward()
        return x.grad.abs().sum((0, 2)) > 0

    assert reached(model).all()
    assert not reached(cut)[: 2 * SEGMENT].any()
    assert reached(cut)[2 * SEGMENT :].all()
    out = cut(ids, labels=ids, use_cache=True)
    out.loss.backward()
    cut(ids, labels=ids, past_key_values=out.past_key_values).loss.backward()


@EVERY
def test_ablations_change_the_model_and_keep_it_sound(kind):
    ids = text()
    whole = make(kind)
    names = {name for name, _ in whole.named_parameters()}
    for options, gone in [
        ({"memory_depth": 1}, "memory_init.1"),
        ({"conv_kernel": 0}, "conv"),
        ({"memory_momentum": False}, "eta_proj"),
        ({"memory_decay": False}, "alpha_proj"),
        ({"num_persistent_tokens": 0}, "persistent"),
    ]:
        model = make(kind, **options)
        left = {name for name, _ in model.named_parameters()}
        assert left < names
        assert all(gone in name for name in names - left)
        assert model(ids, labels=ids).loss.isfinite()


@EVERY
def test_a_read_only_memory_never_changes(kind):
    model = make(kind)
    frozen = make(kind, memory_read_only=True)
    frozen.load_state_dict(model.state_dict())
    ids = text(1)
    cache = frozen(ids, use_cache=True).past_key_values
    state = cache.layers[0].state
    before = frozen.model.layers[0].mixer.initial_state(torch.zeros(1, dtype=torch.float64))
    state, before = (s if kind == "lmm" else s.memory for s in (state, before))
    for got, want in zip(state.weights, before.weights, strict=True):
        assert_close("weights", got, want)
    assert not torch.allclose(frozen(ids).logits, model(ids).logits)


@EVERY
def test_what_the_memory_did(kind):
    """One report a token, the same in any batch, pads and splits included."""
    model, ids = make(kind), text()
    want = model(ids, output_memory=True).memory
    assert want[1] is None
    trace = want[0]
    heads, layers = 2, 2
    assert trace.inner_loss.shape == (*ids.shape, heads)
    for each in (trace.surprise, trace.alpha, trace.eta, trace.theta, trace.memory_norm):
        assert each.shape == (*ids.shape, heads, layers)
        assert (each > 0).all()
        assert each.isfinite().all()
    padded = torch.nn.functional.pad(ids, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    got = model(padded, attention_mask=mask, output_memory=True).memory[0]
    cache, pieces = None, []
    for piece in ids.split([5, 1, ids.shape[1] - 6], 1):
        out = model(piece, past_key_values=cache, use_cache=True, output_memory=True)
        cache = out.past_key_values
        pieces.append(out.memory[0])
    for name, value in trace._asdict().items():
        assert_close(name, getattr(got, name)[:, 3:], value)
        assert not getattr(got, name)[:, :3].any()
        assert_close(name, torch.cat([getattr(p, name) for p in pieces], 1), value)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_size_of_their_name(name):
    with torch.device("meta"):
        model = TitansForCausalLM(TitansConfig.from_preset(name))
    size = name.split("-")[-1]
    want = float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
    assert abs(model.num_parameters() / want - 1) < 0.03


def test_presets_by_name():
    config = TitansConfig.from_preset("titans-mag-340m", vocab_size=100)
    assert config.layer_types == ["mag"] * 24
    assert config.vocab_size == 100
    with pytest.raises(ValueError, match="unknown preset 'titans-340m': use one of titans-lmm-170m"):
        TitansConfig.from_preset("titans-340m")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
@EVERY
def test_lora(kind, tmp_path):
    """PEFT's adapters on the projections of memory and attention: they alone learn, and they load."""
    from peft import LoraConfig, PeftModel, get_peft_model

    base, ids = titans(kind, "sliding_attention")(), text()
    before = {name: p.clone() for name, p in base.named_parameters()}
    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"])
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    got = dict(model.base_model.model.named_parameters())
    for name, value in before.items():
        name = name if name in got else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(got[name], value)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    fresh = titans(kind, "sliding_attention")()
    fresh.load_state_dict(before)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert_close("logits", loaded(ids).logits, model.eval()(ids).logits, torch.float32)


SAVED = {kind: ["memory", "persistent"] for kind in KINDS} | {
    "lm2": ["memory"],
    "lm2-positions": ["memory"],
    "lm2-released": ["memory"],
    "rmt": ["memory"],
}
PARTS = ["theta_proj", "memory_scale", "conv", "output_norm", "o_proj", "mlp_norm"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
@pytest.mark.parametrize("kind", [*KINDS, "lm2", "lm2-positions", "lm2-released", "rmt"])
@pytest.mark.parametrize("part", ["memory", "parts", "head"])
def test_whole_modules_beside_lora(kind, part, tmp_path):
    """PEFT's modules_to_save: copies of memories, of their parts and of the head learn, the originals
    stay, and all of it loads and merges."""
    from peft import LoraConfig, PeftModel, get_peft_model

    saved = {"memory": SAVED[kind], "parts": PARTS, "head": ["lm_head"]}[part]
    if part == "parts" and kind not in KINDS:
        saved = {
            "lm2": ["scale", "slots", "forget_gate"],
            "lm2-positions": ["scale", "forget_gate"],
        }.get(kind, ["norm"])
    torch.manual_seed(0)
    options = {"initial_memory_scale": 0.5} if kind.startswith("lm2") else {}
    base, ids = build(kind, "sliding_attention", **options), text()
    before = {name: p.clone() for name, p in base.named_parameters()}
    inside = r".*\.(memory|persistent)\..*" if part == "memory" else None
    target = ["q_proj", "v_proj"]
    config = LoraConfig(r=2, target_modules=target, modules_to_save=saved, exclude_modules=inside)
    model = get_peft_model(base, config).train()
    trained = {n: p for n, p in model.named_parameters() if "modules_to_save" in n}
    originals = {n: p.clone() for n, p in model.named_parameters() if "original_module" in n}
    assert trained
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=ids, labels=ids).loss.backward()
    # Of a module that only goes by its parameters, such as a convolution's, too.
    unused = {"k_proj"} if kind == "lm2-released" else set()  # a bias that softmax does not see
    for name, parameter in trained.items():
        assert (parameter.grad is not None and parameter.grad.any()) or unused & {*name.split(".")}, (
            name
        )
    optimizer.step()
    for name, value in originals.items():
        assert torch.equal(model.get_parameter(name), value), name
    want = model.eval()(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    fresh = build(kind, "sliding_attention", **options)
    fresh.load_state_dict({**fresh.state_dict(), **before})
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert_close("loaded", loaded(input_ids=ids).logits, want, torch.float32)
    merged = loaded.merge_and_unload()
    assert_close("merged", merged(input_ids=ids).logits, want, torch.float32)


@ANY
def test_a_functional_call(kind):
    """torch.func: other weights for a call, which the model does not keep."""
    model, ids = make(kind), text()
    want = model(ids).logits
    other = {name: 1.1 * p.detach() for name, p in model.named_parameters()}
    got = torch.func.functional_call(model, other, (ids,)).logits
    assert torch.equal(model(ids).logits, want)
    changed = copy.deepcopy(model)
    changed.load_state_dict(other, strict=False)  # without what is tied
    assert torch.equal(got, changed(ids).logits)
    assert not torch.equal(got, want)


@pytest.mark.filterwarnings("ignore:There is a performance drop because")  # torch's, of vmap
@ANY
def test_transforms_of_functions(kind):
    """torch.func.grad and vmap go through LM2 and RMT; Titans refuses them by name."""
    model, ids = make(kind), text()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    options = {"labels": ids, "use_cache": False}

    def loss(weights):
        return torch.func.functional_call(model, weights, (ids,), options).loss

    two = {name: torch.stack([p, 1.1 * p]) for name, p in weights.items()}
    if kind in KINDS:
        for transform, argument in ((torch.func.grad, weights), (torch.func.vmap, two)):
            with pytest.raises(ValueError, match=r"torch\.func.*loss\.backward"):
                transform(loss)(argument)
        return
    grads = torch.func.grad(loss)(weights)
    want = model(ids, **options).loss
    want.backward()
    for name, parameter in model.named_parameters():
        plain = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert_close(name, grads[name], plain, precision(kind))
    assert_close("losses", torch.func.vmap(loss)(two)[0], want, precision(kind))


@pytest.mark.filterwarnings("ignore")  # torch's exporter warns of itself
@pytest.mark.parametrize(
    ("kind", "strict"),
    [
        ("lm2", False),
        *(pytest.param(k, False, marks=pytest.mark.slow) for k in [*KINDS, *OTHERS] if k != "lm2"),
        *(pytest.param(k, True, marks=pytest.mark.slow) for k in [*KINDS, *OTHERS]),
    ],
)
def test_export(kind, strict):
    """torch.export, of a text of several segments."""

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = make(kind)

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    module, ids = Logits(), text()
    with torch.no_grad():
        program = torch.export.export(module, (ids,), strict=strict)
        assert_close("logits", program.module()(ids), module(ids), precision(kind))
        other = (ids + 1) % VOCABULARY
        assert_close("logits", program.module()(other), module(other), precision(kind))


def compiled_equals_eager(kind, backend):
    """Training at two lengths, and reading on from a cache, in one graph each.

    In float64: the compiler takes PyTorch's operations where eager takes native code, and one draw
    in hundreds makes the rounding of any float32 as large as its tolerance.
    """
    torch.manual_seed(0)
    model, ids, grads = titans(kind)().double(), text(2, SEGMENT + 1), []
    torch._dynamo.reset()
    for read in (model, torch.compile(model, fullgraph=True, backend=backend)):
        model.zero_grad()
        found = {}
        for tokens in (SEGMENT + 1, SEGMENT - 1):
            piece = ids[:, :tokens].clone()
            out = read(piece, labels=piece, use_cache=False)
            out.loss.backward()
            found[f"logits of {tokens}"] = out.logits.detach()
        found |= {n: p.grad.clone() for n, p in model.named_parameters()}
        grads.append(found)
    for name in grads[0]:
        assert_close(name, grads[1][name], grads[0][name])
    with torch.no_grad():
        want = model(ids).logits
        cache = MemoryCache(1)
        read(ids[:, :5].clone(), past_key_values=cache)
        got = [read(token.clone(), past_key_values=cache).logits for token in ids[:, 5:].split(1, 1)]
    assert_close("decoded", torch.cat(got, 1), want[:, 5:])


COMPILER = pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself


@COMPILER
@pytest.mark.parametrize("kind", ["lmm", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS[1:])])
def test_compile_in_one_graph(kind):
    compiled_equals_eager(kind, "aot_eager")


@COMPILER
@pytest.mark.parametrize(
    "kind", ["mag", *(pytest.param(k, marks=pytest.mark.slow) for k in ("lmm", "mac", "mal"))]
)
def test_a_compiled_step_serves_all_tokens(kind):
    """A few programs, for what happens at borders of chunks and segments; none for a position."""
    torch.manual_seed(0)
    model, ids = titans(kind)().double().eval(), text(1, 6 * SEGMENT)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        want = model(ids).logits
        cache = model(ids[:, : 2 * SEGMENT], use_cache=True).past_key_values
        got, programs = [], []
        for token in ids[:, 2 * SEGMENT :].split(1, 1):
            got.append(step(token.clone(), past_key_values=cache).logits)
            programs.append(counter.frame_count)
    assert_close("decoded", torch.cat(got, 1), want[:, 2 * SEGMENT :])
    assert programs[2 * SEGMENT] == programs[-1]


@ANY
def test_no_tokens_change_nothing(kind):
    model, ids = make(kind), text()
    assert model(ids[:, :0]).logits.shape == (2, 0, VOCABULARY)
    cache = model(ids[:, :9], use_cache=True).past_key_values
    assert model(ids[:, :0], past_key_values=cache).logits.shape == (2, 0, VOCABULARY)
    assert_close("logits", model(ids[:, 9:], past_key_values=cache).logits, model(ids).logits[:, 9:])


@EVERY
def test_documents_that_start_in_a_carried_row_train_what_they_see(kind):
    """Law 6 in streams: the row's old state is cut off and stale; the new document is as if alone."""
    model, ids = make(kind).train(), text(2, 3 * SEGMENT)
    cache = model(ids[:, :7], use_cache=True).past_key_values.detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    new, positions = ids[:, 7:], torch.arange(ids.shape[1] - 7)[None]
    got = model(new, position_ids=positions, past_key_values=cache).logits
    got.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    want = model(new).logits
    want.square().sum().backward()
    assert_close("logits", got, want)
    for name, parameter in model.named_parameters():
        assert_close(name, grads[name], parameter.grad)


@EVERY
def test_a_memory_does_not_change_with_the_parameters(kind):
    model, ids = make(kind, num_persistent_tokens=0), text(1, 3)
    state = model(ids, use_cache=True).past_key_values.detach().layers[0].state
    before = {name: x.clone() for name, x in state.tensors().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    for name, value in state.tensors().items():
        assert torch.equal(value, before[name]), name


def test_generate_from_needs_no_no_grad():
    model, ids = make("mac"), text()
    cache = model(ids, use_cache=True).past_key_values
    asked = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert model.generate_from(cache, ids[:, :3], **asked).shape == (2, 6)
    asked |= {"num_return_sequences": 2, "num_beams": 2}
    assert model.generate_from(cache, ids[:, :3], **asked).shape == (4, 6)
    for wrong in ({"use_cache": False}, {"past_key_values": None}):
        arguments = {"past_key_values": cache, "input_ids": ids, **wrong}
        with pytest.raises(ValueError, match="goes on from a MemoryCache"):
            model.generate_from(**arguments)


@pytest.mark.parametrize(
    ("field", "value"), [("segment_length", 4), ("sliding_window", 3), ("num_persistent_tokens", 1)]
)
def test_a_cache_of_a_model_with_other_states_is_refused(field, value, tmp_path):
    cache = make("mac")(text(), use_cache=True).past_key_values
    cache.save(tmp_path / "memory.safetensors")
    for held in (cache, MemoryCache.load(tmp_path / "memory.safetensors")):
        with pytest.raises(ValueError, match=f"belongs to another model, with {field}"):
            make("mac", **{field: value})(text(), past_key_values=held)


def test_a_float32_memory_in_a_half_precision_model():
    model, ids = make("mag").float(), text()
    cache = model(ids, use_cache=True).past_key_values
    assert model.bfloat16()(ids, past_key_values=cache).logits.isfinite().all()


@ANY
def test_hidden_states(kind):
    model, ids = make(kind), text()
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == (2 if kind.startswith("rmt") else 3)
    assert_close("logits", model.lm_head(out.hidden_states[-1]), out.logits, precision(kind))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (2, 0))
    padded = model(torch.nn.functional.pad(ids, (2, 0)), attention_mask=mask, output_hidden_states=True)
    for got, want in zip(padded.hidden_states, out.hidden_states, strict=True):
        assert_close("hidden", got[:, 2:], want, precision(kind))


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@ANY
@pytest.mark.parametrize("options", [{}, {"backprop_segments": 1}], ids=["whole", "cut"])
def test_distributed_data_parallel_waits_for_no_gradient(kind, options, one_process):
    """Of what a short text does not write, of starts where a text goes on, of what gradients that are
    cut do not reach: at their plain setting every parameter has to have its turn."""
    model = make(kind, **options).train()
    parallel = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    cache = None
    for tokens in (3, SEGMENT, 2 * SEGMENT + 3, 5):
        ids = text(2, tokens)
        want = model(ids, labels=ids, past_key_values=None if cache is None else cache.copy())
        want.loss.backward()
        got = parallel(input_ids=ids, labels=ids, past_key_values=cache, use_cache=True)
        got.loss.backward()
        cache = got.past_key_values.detach()
    for name, parameter in model.named_parameters():
        grad = parallel.module.get_parameter(name).grad
        want = torch.zeros_like(grad) if parameter.grad is None else parameter.grad
        assert torch.equal(grad, want), name

"""The laws that every layer and model of the library keeps, whatever is inside it.

1 causal, 3 split, 4 row, 5 padding, 6 packing, 7 cache, 8 reach, 9 bounded, 10 round trip; law 2
(the fast form equals the reference) stands beside each op and block. 3 to 7 hold in float64 to the
tolerance table.
"""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from everlong import NeuralMemory, NeuralMemoryState
from everlong.ops.backend import use_backend
from numerics import assert_close
from subjects import CHUNK, DEVICE, LONG, SUBJECTS, VOCABULARY, WINDOW

TOKENS = 3 * CHUNK + WINDOW + 3  # several chunks and windows, and a rest of neither
EVERY = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)
MODELS = pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.is_model], ids=lambda s: s.name)


@EVERY
def test_law_1_causal(subject):
    """Changing token s moves nothing before s, to the last bit, and something from s on."""
    module, x = subject.make(), subject.inputs(2, TOKENS)
    with torch.no_grad():
        want, _ = subject.read(module, x)
        for s in range(TOKENS):
            got, _ = subject.read(module, subject.changed(x, s))
            assert torch.equal(got[:, :s], want[:, :s]), f"token {s} moved an earlier output"
            assert not torch.equal(got[:, s], want[:, s]), f"token {s} is not seen at all"


PLACES = (1, CHUNK - 1, CHUNK, 2 * CHUNK + 1, TOKENS - 1)
BACKENDS = pytest.mark.parametrize("backend", ["auto", "eager"])


@EVERY
@BACKENDS
@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.float32, 1e8), (torch.bfloat16, 1e8), (torch.float64, 1e38)], ids=str
)
def test_law_1_with_large_rows(subject, dtype, largest, backend):
    """Of a layer's input, or embeddings of a model, beside small ones."""
    module, generator = subject.make(dtype), torch.Generator().manual_seed(0)
    x = torch.randn(2, TOKENS, 8, generator=generator, dtype=torch.float64)
    size = largest ** torch.rand(2, TOKENS, 1, generator=generator, dtype=torch.float64)
    size[:, ::3] = largest
    x = (x / x.abs().amax(-1, keepdim=True) * size).to(dtype)

    def read(x):
        return module(inputs_embeds=x).logits if subject.is_model else module(x)[0]

    with torch.no_grad(), use_backend(backend):
        want = read(x)
        assert want.isfinite().all()
        for s in PLACES:
            other = x.clone()
            other[:, s] = -largest
            assert torch.equal(read(other)[:, :s], want[:, :s]), f"token {s} moved an earlier output"


@pytest.mark.parametrize("subject", [s for s in SUBJECTS if not s.is_model], ids=lambda s: s.name)
@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_law_1_is_promised_where_all_is_finite(subject, dtype, backend):
    """From small rows to the largest that there are: no token moves an earlier output by a bit unless
    an output or a state is not finite with it or without."""
    largest, step = (38, 1) if dtype == torch.float32 else (307, 9)
    module, within = subject.make(dtype), 0

    def read(x):
        y, state = subject.read(module, x)
        return y, all(each.isfinite().all() for each in [y, *subject.leaves(state)])

    with torch.no_grad(), use_backend(backend):
        for exponent in range(0, largest + 1, step):
            x = subject.inputs(2, TOKENS)
            x = (x / x.abs().max() * 10.0**exponent).to(dtype)
            want, sound = read(x)
            for s in PLACES if sound else ():
                other = x.clone()
                other[:, s] = -x[:, s].flip(-1)
                got, sound = read(other)
                within += sound
                assert not sound or torch.equal(got[:, :s], want[:, :s]), (exponent, s)
    assert within >= 5 * len(PLACES)


@EVERY
@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_law_3_split(subject, sizes):
    """Any split into calls, mid-chunk and mid-window, gives one call's outputs."""
    module = subject.make()
    total = sum(sizes)
    x = subject.inputs(2, total)
    with torch.no_grad():
        want, _ = subject.read(module, x)
        state, pieces = None, []
        for piece in x.split(sizes, 1):
            y, state = subject.read(module, piece, state)
            pieces.append(y)
    assert_close("split", torch.cat(pieces, 1), want, subject.precision)


@EVERY
def test_law_3_single_tokens(subject):
    module, x = subject.make(), subject.inputs(2, TOKENS)
    with torch.no_grad():
        want, _ = subject.read(module, x)
        state, pieces = None, []
        for token in x.split(1, 1):
            y, state = subject.read(module, token, state)
            pieces.append(y)
    assert_close("token by token", torch.cat(pieces, 1), want, subject.precision)


@EVERY
def test_law_3_gradients_cross_calls(subject):
    """The gradient through a carried state is the gradient of one call."""
    module, x = subject.make(), subject.inputs(1, TOKENS)
    weights = torch.randn(subject.read(module, x)[0].shape, dtype=torch.float64).to(DEVICE)
    grads = []
    for cuts in ([TOKENS], [CHUNK + 1, 1, TOKENS - CHUNK - 2]):
        state, pieces = None, []
        for piece in x.split(cuts, 1):
            y, state = subject.read(module, piece, state)
            pieces.append(y)
        module.zero_grad()
        (torch.cat(pieces, 1) * weights).sum().backward()
        grads.append({name: p.grad.clone() for name, p in module.named_parameters()})
    for name in grads[0]:
        assert_close(name, grads[1][name], grads[0][name], subject.precision)


@EVERY
def test_law_4_row(subject):
    """A row alone equals the row in a batch, in outputs and gradients, and so does its state."""
    module, x = subject.make(), subject.inputs(3, TOKENS)
    with torch.no_grad():
        want, state = subject.read(module, x)
        more, _ = subject.read(module, x[:, :5], copy.deepcopy(state))
        for row in range(3):
            got, _ = subject.read(module, x[row : row + 1])
            assert_close(f"row {row}", got, want[row : row + 1], subject.precision)
        taken = subject.select(copy.deepcopy(state), [2, 0])
        got, _ = subject.read(module, x[[2, 0], :5], taken)
    assert_close("selected rows", got, more[[2, 0]], subject.precision)


# How a row of a call looks: p a pad, s a token that starts a document, . any other token.
LAYOUT = st.lists(st.text("p..s..", min_size=1, max_size=24), min_size=1, max_size=3)


@EVERY
@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.lists(LAYOUT, min_size=1, max_size=3), st.integers(1, 3))
def test_laws_5_and_6_padding_and_packing(subject, calls, batch):
    """Rows with pads anywhere and documents that start anywhere, over several calls, equal each
    document read alone; what is read next too."""
    module = subject.make()
    rows = [[(call * batch)[row] for call in calls] for row in range(batch)]
    width = [max(len(row[n]) for row in rows) for n in range(len(calls))]
    rows = [[part.ljust(n, "p") for part, n in zip(row, width, strict=True)] for row in rows]
    state = None
    documents: list[list] = [[None] for _ in rows]  # of each row: what was read of each
    for n, columns in enumerate(width):
        looks = [row[n] for row in rows]
        x = subject.inputs(batch, columns, seed=n)
        mask = torch.tensor([[c != "p" for c in look] for look in looks])
        starts = torch.tensor([[c == "s" for c in look] for look in looks])
        with torch.no_grad():
            y, state = subject.read_rows(module, x, mask, starts, state)
        for row, look in enumerate(looks):
            for t, c in enumerate(look):
                if c == "s":
                    documents[row].append(None)
                if c != "p":
                    pair = (x[row : row + 1, t : t + 1], y[row : row + 1, t : t + 1])
                    documents[row][-1] = [*(documents[row][-1] or []), pair]
    more = subject.inputs(batch, 5, seed=99)
    with torch.no_grad():
        after, _ = subject.read(module, more, state)
        for row, parts in enumerate(documents):
            for part in parts:
                if part is not None:
                    read, wanted = (torch.cat(each, 1) for each in zip(*part, strict=True))
                    got, alone = subject.read(module, read)
                    assert_close(f"document of {read.shape[1]}", got, wanted, subject.precision)
                    last = alone
            if parts[-1] is None:
                last = None
            want, _ = subject.read(module, more[row : row + 1], last)
            assert_close("continued", after[row : row + 1], want, subject.precision)


@EVERY
def test_laws_5_and_6_in_gradients(subject):
    """Gradients of a packed and padded batch are those of its documents."""
    module = subject.make()
    lengths, x = (3, 2 * WINDOW + 1, CHUNK), subject.inputs(1, 4 + 3 + 2 * WINDOW + 1 + CHUNK)
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    mask[0, [0, 1, 5, -1]] = False
    starts = torch.zeros_like(mask)
    real = mask[0].nonzero()[:, 0]
    starts[0, real[[0, lengths[0], lengths[0] + lengths[1]]]] = True
    subject.read_rows(module, x, mask, starts)[0].square().sum().backward()
    packed = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    loss = sum(subject.read(module, part)[0].square().sum() for part in x[:, real].split(lengths, 1))
    # What is read at pads has no history, but a model's head sees a row of zeros there.
    loss.backward()
    for name, parameter in module.named_parameters():
        assert_close(name, packed[name], parameter.grad, subject.precision)


@MODELS
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_law_7_cache(subject, options):
    """`generate` with and without the cache agree, over several chunks and windows."""
    module = subject.make()
    prompt = subject.inputs(2, CHUNK + 1)
    asked = {"max_new_tokens": 2 * WINDOW + CHUNK, "do_sample": False, "pad_token_id": 0, **options}
    asked["attention_mask"] = torch.ones_like(prompt)  # else generate takes token 0 for a pad
    with_cache = module.generate(prompt, **asked)
    assert with_cache.shape[1] == prompt.shape[1] + asked["max_new_tokens"]
    assert torch.equal(with_cache, module.generate(prompt, use_cache=False, **asked))


@MODELS
def test_law_7_assisted_decoding_is_refused(subject):
    module, helper = subject.make(), subject.make()
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        module.generate(subject.inputs(1, 3), assistant_model=helper, max_new_tokens=2)


@EVERY
def test_law_8_reach(subject):
    """After several chunks every parameter has a gradient, from a fresh start."""
    torch.manual_seed(0)
    module = subject.build().to(DEVICE)
    x = subject.inputs(2, TOKENS, dtype=torch.float32)
    if subject.is_model:
        loss = module(x, labels=x).loss
    else:
        loss = subject.read(module, x)[0].square().mean()
    loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name} is out of reach"
        if name.endswith("embed_tokens.weight"):
            assert parameter.grad[x.unique()].abs().sum(1).all(), f"{name}: a token is out of reach"
        else:
            assert parameter.grad.abs().sum() > 0, f"{name} has a zero gradient"
        assert parameter.grad.isfinite().all(), name


def read_on(subject, module, tokens, dtype, piece=1000):
    """Stream extreme inputs; the state after every piece must be finite."""
    state = None
    with torch.inference_mode():
        for start in range(0, tokens, piece):
            x = subject.inputs(1, piece, seed=start)
            if not subject.is_model:
                # Every magnitude up to 1e4, and stretches of one repeated row.
                x = (
                    x
                    * 10
                    ** torch.linspace(-4, 4, piece, dtype=torch.float64, device=DEVICE)[None, :, None]
                )
                x = (x.clamp(-1e4, 1e4) if start % 2000 else x[:, :1].expand_as(x) * 1e4).to(dtype)
            y, state = subject.read(module, x, state)
            assert y.isfinite().all(), f"outputs after {start + piece} tokens"
            for leaf in subject.leaves(state):
                assert leaf.isfinite().all(), f"the state after {start + piece} tokens"


BOUNDED = [
    s
    for s in SUBJECTS
    if s.name in ("layer", "layer-linear", "layer-deep", "lmm", "mac", "mag", "mal", "hybrid")
    or s.name.startswith("lm2")
]


@pytest.mark.parametrize("subject", BOUNDED, ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_law_9_bounded(subject, dtype):
    tokens = 3_000 if subject.name == "hybrid" else 20_000  # full attention is quadratic
    read_on(subject, subject.make(dtype), tokens, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("subject", LONG, ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_law_9_bounded_a_million(subject, dtype):
    read_on(subject, subject.make(dtype), 1_000_000, dtype, piece=10_000)


@MODELS
def test_law_10_round_trip(subject, tmp_path):
    """Save, load, continue equals continue; an optimizer step works right after loading."""
    module, x = subject.make(), subject.inputs(2, TOKENS)
    with torch.no_grad():
        _, state = subject.read(module, x[:, :7])
        want, _ = subject.read(module, x[:, 7:], copy.deepcopy(state))
    module.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).to(DEVICE)
    with torch.no_grad():
        got, _ = subject.read(loaded, x[:, 7:], state)
    assert torch.equal(got, want)
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=0.1)
    loaded.train()
    loaded(x, labels=x).loss.backward()
    optimizer.step()
    for name, parameter in loaded.named_parameters():
        before = module.get_parameter(name)
        assert not torch.equal(parameter, before), f"{name} did not move"


def test_law_10_memories_and_weights_of_the_layer(tmp_path):
    torch.manual_seed(0)
    layer = NeuralMemory(8, 2, chunk_size=CHUNK)
    x = torch.randn(2, 11, 8)
    with torch.no_grad():
        _, state = layer(x[:, :6])
        want, _ = layer(x[:, 6:], state)
        state.save(tmp_path / "memory.safetensors")
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        other = NeuralMemory(8, 2, chunk_size=CHUNK)
        other.load_state_dict(torch.load(file, weights_only=True))
        got, _ = other(x[:, 6:], NeuralMemoryState.load(tmp_path / "memory.safetensors"))
    assert torch.equal(got, want)


def test_vocabulary_is_used():
    """The inputs above cover every token, so that law 8 speaks of every embedding."""
    assert len(SUBJECTS[4].inputs(2, TOKENS).unique()) == VOCABULARY


@EVERY
def test_a_default_device_changes_nothing(subject):
    """What counts tokens stays where it is, whatever device new tensors go to; forward and backward."""
    module, x = subject.make(), subject.inputs(2, TOKENS)
    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    mask[1, :2] = False
    results = []
    for device in ("cpu", "meta"):
        module.zero_grad()
        with torch.device(device):
            y, state = subject.read_rows(module, x, mask, torch.zeros_like(mask))
            y = torch.cat([y, subject.read(module, x[:, :3], state)[0]], 1)
            y.square().sum().backward()
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        results.append([y.detach(), *grads])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)

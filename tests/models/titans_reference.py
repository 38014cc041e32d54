"""The Titans blocks token by token, written from the equations: one sequence, loops, autograd.

Nothing here is shared with the library but the parameters.
"""

import math

import torch


def silu(x):
    return x * torch.sigmoid(x)


GATES = {"silu": silu, "sigmoid": torch.sigmoid}


def rms_norm(norm, x):
    return norm.weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + norm.eps)


def unit(x):
    return x / torch.sqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class Conv:
    """silu of a causal convolution, one token at a time; the last inputs are remembered."""

    def __init__(self, taps):
        self.taps = taps
        self.seen = []

    def __call__(self, row):
        if self.taps is None:
            return silu(row)
        self.seen.append(row)
        reach = self.taps.shape[1]
        last = self.seen[-reach:]
        return silu(sum(self.taps[:, reach - 1 - i] * x for i, x in enumerate(reversed(last))))


class Memory:
    """M_t of one sequence, by v1 eqs. 8-15 gradients taken at a chunk's start."""

    def __init__(self, layer):
        self.layer = layer
        taps = [None] * 3 if layer.conv is None else layer.conv.weight.chunk(3)
        self.q_conv, self.k_conv, self.v_conv = (Conv(t) for t in taps)
        self.now = [w.weight * u for w, u in zip(layer.memory_init, layer.units, strict=True)]
        self.momentum = [torch.zeros_like(w) for w in self.now]
        self.trace = []  # of each token written: what `MemoryTrace` says of it
        self.close()

    def close(self):
        """The next token is the first of a chunk."""
        self.start, self.position = self.now, 0

    def heads(self, row):
        return row.view(self.layer.num_heads, self.layer.head_dim)

    def network(self, weights, x):
        """M(x) = x + scale LN(W_L gelu(... W_1 x)), x: [H, K]."""
        hidden = x
        for i, w in enumerate(weights):
            if i:
                hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
            hidden = torch.einsum("hi,hio->ho", hidden, w)
        if self.layer.memory_scale is None:
            return hidden
        centred = hidden - hidden.mean(-1, keepdim=True)
        normed = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
        return x + self.layer.memory_scale.weight * normed

    def answer(self, x, weights, conv):
        """What the layer gives for x when its memory is `weights`."""
        q = unit(self.heads(conv(self.layer.q_proj.weight @ x)))
        y = rms_norm(self.layer.output_norm, self.network(weights, q)).flatten()
        return self.layer.o_proj.weight @ (silu(self.layer.gate_proj.weight @ x) * y)

    def gate(self, projection, x, more=0):
        logits = projection.weight @ x + projection.bias
        return torch.sigmoid(logits.view(self.layer.num_heads, -1) + more)

    def by_key(self, k):
        """What the keys add to theta's logits, [H, L]."""
        if self.layer.theta_key is None:
            return 0
        columns = self.layer.theta_key.weight.unbind(-1)
        return math.sqrt(self.layer.head_dim) * torch.stack([(k * u).sum(-1) for u in columns], -1)

    def read_write(self, x):
        """Write x, then answer it."""
        layer = self.layer
        k = unit(self.heads(self.k_conv(layer.k_proj.weight @ x)))
        v = self.heads(self.v_conv(layer.v_proj.weight @ x))
        if layer.value_length is not None:
            v = unit(v) * layer.value_length
        # The inner gradient is of the weights alone, though k and v may have been made with them.
        start = [w * 1.0 for w in self.start]
        loss = (self.network(start, k) - v).square().sum(-1)
        surprise = torch.autograd.grad(loss.sum(), start, create_graph=True)
        theta = self.gate(layer.theta_proj, x, self.by_key(k))
        with torch.no_grad():  # the gate's gradient is that of a gate that is written as it is
            faint = theta * (theta < layer.write_threshold)
        theta = (theta - faint) * theta.new_tensor(layer.max_thetas)
        eta, alpha = torch.zeros_like(theta), torch.zeros_like(theta)
        if layer.eta_proj is not None:
            eta = self.gate(layer.eta_proj, x)
            theta = theta * (1 - eta)
        if layer.alpha_proj is not None:
            alpha[:, -layer.forgetting_layers :] = self.gate(layer.alpha_proj, x)
        self.momentum = [
            eta[:, i, None, None] * s - theta[:, i, None, None] * u
            for i, (s, u) in enumerate(zip(self.momentum, surprise, strict=True))
        ]
        self.now = [
            (1 - alpha[:, i, None, None]) * m + s
            for i, (m, s) in enumerate(zip(self.now, self.momentum, strict=True))
        ]
        if layer.eta_proj is None:
            self.momentum = [torch.zeros_like(s) for s in self.momentum]
        self.trace.append((loss, norms(surprise), alpha, eta, theta, norms(self.now)))
        self.position += 1
        y = self.answer(x, self.now, self.q_conv)
        if self.position == layer.chunk_size:
            self.close()
        return y


def norms(matrices):
    """Of each head's matrix and layer, [H, L]."""
    return torch.stack([x.square().sum((-1, -2)).sqrt() for x in matrices], -1)


class Attention:
    """Softmax over an explicit list of keys, one query at a time."""

    def __init__(self, layer):
        self.layer = layer
        self.keys = []  # (position, key, value) by head; position None: always in sight

    def heads(self, projection, x, position=None):
        rows = (projection.weight @ x).view(-1, self.layer.head_dim)
        if position is None:
            return rows
        half = self.layer.head_dim // 2
        angle = position * self.layer.rope_theta ** (-torch.arange(half, dtype=x.dtype) / half)
        turned = torch.complex(rows[:, :half], rows[:, half:]) * torch.exp(1j * angle)
        return torch.cat([turned.real, turned.imag], -1)

    def show(self, x, position=None):
        k = self.heads(self.layer.k_proj, x, position)
        v = self.heads(self.layer.v_proj, x)
        self.keys.append((position, k, v))

    def __call__(self, x, position=None, window=math.inf):
        """The output for x among the keys in sight."""
        q = self.heads(self.layer.q_proj, x, position)
        seen = [(k, v) for at, k, v in self.keys if at is None or at > position - window]
        groups = len(q) // len(seen[0][0])
        heads = []
        for head, query in enumerate(q):
            scores = torch.stack([query @ k[head // groups] for k, _ in seen])
            weights = torch.softmax(scores / math.sqrt(len(query)), 0)
            heads.append(sum(w * v[head // groups] for w, (_, v) in zip(weights, seen, strict=True)))
        return self.layer.o_proj.weight @ torch.cat(heads)


def persistent(block):
    return [] if block.persistent is None else list(block.persistent.weight)


def lmm(block, rows, config):
    memory = Memory(block.memory)
    for p in persistent(block):
        memory.read_write(p)
    memory.close()
    return [memory.read_write(x) for x in rows], memory.trace


def mag(block, rows, config):
    memory, attention, outputs = Memory(block.memory), Attention(block.attention), []
    for p in persistent(block):
        memory.read_write(p)
        attention.show(p)
    memory.close()
    for t, x in enumerate(rows):
        attention.show(x, t)
        y = rms_norm(block.attention_norm, attention(x, t, block.attention.window))
        outputs.append(y * GATES[config.gate_act](rms_norm(block.memory_norm, memory.read_write(x))))
    return outputs, memory.trace


def mal(block, rows, config):
    memory, attention, outputs = Memory(block.memory), Attention(block.attention), []
    for p in persistent(block):
        attention.show(rms_norm(block.memory_norm, memory.read_write(p)))
    memory.close()
    for t, x in enumerate(rows):
        m = rms_norm(block.memory_norm, memory.read_write(x))
        attention.show(m, t)
        outputs.append(attention(m, t, block.attention.window))
    return outputs, memory.trace


def mac(block, rows, config):
    memory, outputs = Memory(block.memory), []
    read_conv = Conv(None if block.memory.conv is None else block.memory.conv.weight.chunk(3)[0])
    among = Attention(block.attention)
    for p in persistent(block):
        among.show(p)
        if read_conv.taps is not None:
            read_conv(block.memory.q_proj.weight @ p)
    for p in persistent(block):
        memory.read_write(rms_norm(block.attention_norm, config.mac_residual * p + among(p)))
    memory.close()
    for start in range(0, len(rows), block.attention.segment):
        before, attention = memory.now, Attention(block.attention)
        for p in persistent(block):
            attention.show(p)
        for t, x in enumerate(rows[start : start + block.attention.segment]):
            attention.show(memory.answer(x, before, read_conv), t)
            attention.show(x, t)
            seen = attention(x, t)
            y = rms_norm(block.attention_norm, seen)
            told = rms_norm(block.attention_norm, config.mac_residual * x + seen)
            outputs.append(
                y * GATES[config.gate_act](rms_norm(block.memory_norm, memory.read_write(told)))
            )
    return outputs, memory.trace


REFERENCES = {"lmm": lmm, "mag": mag, "mal": mal, "mac": mac}

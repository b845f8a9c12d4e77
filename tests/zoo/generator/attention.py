"""Draws multi-head latent attention in the ways people write it, and in ways that look like it and are something else.

Suffixes in the generated text: B requests, S queries, T keys, H heads, D width, C latent, N nope, R rope, V value.
"""

from __future__ import annotations

from hypothesis import strategies as st

from tests.zoo.generator.program import Program, Writer

PRECISIONS = (("float64", "float64"),) * 5 + (
    ("float32", "float32"),
    ("bfloat16", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float32"),
)

# B, S, D, H, N, R, V, C. Few, so that torch need not work out the shapes of every module anew. Where all are equal, no
# shape betrays a dimension that stands for another.
SIZES = ((2, 6, 11, 3, 6, 4, 5, 7),) * 3 + (
    *((4, 4, 4, 4, 4, 4, 4, 4),) * 2,
    (1, 7, 11, 2, 4, 4, 4, 6),
    (3, 2, 11, 1, 5, 2, 6, 9),
    (2, 1, 11, 4, 8, 4, 3, 7),
    (2, 17, 11, 2, 6, 0, 5, 3),  # no narrower than the keys would be plain attention
)


class AttentionWriter(Writer):
    """One attention: `latent` [B, T, C], `k_rope` [B, 1, T, R], queries, keys and values are local names."""

    def sizes(self) -> list[str]:
        self.B, self.S, D, self.H, self.N, self.R, self.V, self.C = self.pick(*SIZES)
        return [f"B, D = {self.B}, {D}", f"H, N, R, V, C = {self.H}, {self.N}, {self.R}, {self.V}, {self.C}"]

    # ---- query

    def query(self) -> None:
        source = "x"
        if self.some():
            a, b = self.weight("q_a", "13", "D"), self.weight("q_b", "H * (N + R)", "13")
            self.add(f"q = F.linear(F.rms_norm(F.linear({source}, {a}), (13,)), {b})")
        else:
            self.add(f"q = F.linear({source}, {self.weight('q', 'H * (N + R)', 'D')})")
        self.add(
            self.pick(
                "q = q.view(b, s, H, N + R).transpose(1, 2)",
                "q = q.unflatten(-1, (H, N + R)).transpose(1, 2)",
                "q = q.reshape(b, s, H, N + R).permute(0, 2, 1, 3)",
                "q = q.view(b, s, H, -1).movedim(2, 1)",
            )
        )
        self.noise("q")
        self.split("q", "q_nope", "q_rope", "N", "R")

    def split(self, source: str, first: str, second: str, left: str, right: str, *, dim: str = "-1") -> None:
        """Two consecutive parts of the last dimension."""
        forms = [
            f"{first}, {second} = {source}.split([{left}, {right}], {dim})",
            f"{first}, {second} = {source}[..., :{left}], {source}[..., {left}:]",
            f"{first}, {second} = torch.split({source}, ({left}, {right}), dim={dim})",
            f"{first}, {second} = {source}.narrow({dim}, 0, {left}), {source}.narrow({dim}, {left}, {right})",
            f"{first}, {second} = {source}.tensor_split(({left},), {dim})",
        ]
        if getattr(self, left, 0) == getattr(self, right, 1):
            forms.append(f"{first}, {second} = {source}.chunk(2, {dim})")
        self.add(self.pick(*forms))

    # ---- latent and rotated key

    def down(self) -> None:
        if self.some(4):
            self.add(f"latent = F.linear(x, {self.weight('kv_c', 'C', 'D')})")
            self.add(f"k_rope = F.linear(x, {self.weight('kv_r', 'R', 'D')})")
        else:
            self.add(f"kv = F.linear(x, {self.weight('kv_a', 'C + R', 'D')})")
            self.split("kv", "latent", "k_rope", "C", "R")
        if self.some(2):
            self.add("latent = F.rms_norm(latent, (C,))")
        self.noise("latent")
        self.add(
            self.pick(
                "k_rope = k_rope.unsqueeze(1)",
                "k_rope = k_rope.view(b, 1, s, R)",
                "k_rope = k_rope[:, None]",
                "k_rope = k_rope.unsqueeze(2).transpose(1, 2)",
            )
        )

    def rope(self) -> None:
        kind = self.pick("half", "none", "interleaved", "complex", "deinterleaved", "partial") if self.R else "none"
        if kind == "none":
            return
        self.add("angle = (start + torch.arange(s)).to(wide)[:, None] * 0.7 ** torch.arange(R // 2)")
        self.add("cos, sin = angle.cos(), angle.sin()")
        if self.some(4):  # both at once
            self.add("both = torch.cat([q_rope, k_rope], 1)", *self.rotate(kind, "both"))
            self.add("q_rope, k_rope = both.split([H, 1], 1)")
            return
        for name in ("q_rope", "k_rope"):
            self.add(*self.rotate(kind, name))

    def rotate(self, kind: str, x: str) -> list[str]:
        if kind == "interleaved":
            return [
                f"even, odd = {x}[..., 0::2], {x}[..., 1::2]",
                f"{x} = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(work)",
            ]
        if kind == "complex":
            real = "torch.float64" if self.work == "float64" else "torch.float32"
            return [
                f"pairs = torch.view_as_complex({x}.to({real}).contiguous().reshape(*{x}.shape[:-1], -1, 2))",
                f"turn = torch.complex(cos.to({real}), sin.to({real}))",
                f"{x} = torch.view_as_real(pairs * turn).flatten(3).to(work)",
            ]
        if kind == "partial":
            return [f"{x} = torch.cat([{x}[..., : R // 2] * cos, {x}[..., R // 2 :]], -1).to(work)"]
        lines = []
        if kind == "deinterleaved":
            lines.append(f"{x} = {x}.unflatten(-1, (-1, 2)).transpose(-1, -2).reshape({x}.shape)")
        return [
            *lines,
            f"first, second = {x}.chunk(2, -1)",
            "turned = torch.cat([-second, first], -1) * torch.cat([sin, sin], -1)",
            f"{x} = ({x} * torch.cat([cos, cos], -1) + turned).to(work)",
        ]

    # ---- cache

    def cache(self, kind: str) -> None:
        if kind == "static":
            self.init += [
                "self.register_buffer('c_cache', torch.zeros(B, 9, C, dtype=work))",
                "self.register_buffer('r_cache', torch.zeros(B, 1, 9, R, dtype=work))",
            ]
            self.add("where = start + torch.arange(s)")
            self.add(
                self.pick("self.c_cache.index_copy_(1, where, latent)", "self.c_cache[:, where] = latent"),
                self.pick("self.r_cache.index_copy_(2, where, k_rope)", "self.r_cache[:, :, where] = k_rope"),
                "latent, k_rope = self.c_cache, self.r_cache",
            )
        if kind == "past":
            self.add("latent = torch.cat([past_c, latent], 1)", "k_rope = torch.cat([past_r, k_rope], 2)")
        self.add("t = latent.shape[1]")

    # ---- up-projection

    def up(self) -> None:
        plain = ["fused", "separate", "einsum", "matmul", "sliced"] + ["blocks"] * (self.N == self.V)
        kind = self.promised(tuple(plain), ("columns", "batched", "value_first"))
        if kind == "separate":
            k, v = self.weight("k_b", "H * N", "C"), self.weight("v_b", "H * V", "C")
            self.add(f"k_nope = F.linear(latent, {k}).view(b, t, H, N).transpose(1, 2)")
            self.add(f"v = F.linear(latent, {v}).view(b, t, H, V).transpose(1, 2)")
        elif kind in ("einsum", "batched"):
            w = self.weight("kv_b", "H * (N + V)", "C")
            self.add(f"w = {w}.view(H, N + V, C)")
            for name, part in (("k_nope", ":N"), ("v", "N:")):
                self.add(
                    f"{name} = torch.einsum('btc,hdc->bhtd', latent, w[:, {part}])"
                    if kind == "einsum"
                    else f"{name} = latent.unsqueeze(1) @ w[:, {part}].transpose(1, 2)"
                )
        elif kind == "sliced":
            w = self.weight("kv_b", "H * N + H * V", "C")
            self.add(f"k_nope = F.linear(latent, {w}[: H * N]).view(b, t, H, N).transpose(1, 2)")
            self.add(f"v = F.linear(latent, {w}[H * N :]).view(b, t, H, V).transpose(1, 2)")
        elif kind == "blocks":
            self.add(f"kv = F.linear(latent, {self.weight('kv_b', '2 * H * N', 'C')}).view(b, t, 2, H, N)")
            self.add("k_nope, v = (z.transpose(1, 2) for z in kv.unbind(2))")
        else:
            if kind == "matmul":
                self.add(f"kv = latent @ {self.weight('kv_b', 'C', 'H * (N + V)')}")
            else:
                self.add(f"kv = F.linear(latent, {self.weight('kv_b', 'H * (N + V)', 'C')})")
            if kind == "columns":
                self.add("kv = kv.view(b, t, N + V, H).permute(0, 3, 1, 2)")
            else:
                self.add(
                    self.pick(
                        "kv = kv.view(b, t, H, N + V).transpose(1, 2)", "kv = kv.unflatten(2, (H, -1)).transpose(1, 2)"
                    )
                )
            self.noise("kv")
            if kind == "value_first":
                self.split("kv", "v", "k_nope", "V", "N")
            else:
                self.split("kv", "k_nope", "v", "N", "V")

    def key(self) -> None:
        self.noise("k_nope", "k_rope", "v", "q_nope")
        shared = self.pick(
            "k_rope.expand(-1, H, -1, -1)",
            "k_rope.expand(b, H, t, R)",
            "k_rope.repeat(1, H, 1, 1)",
            "k_rope.repeat_interleave(H, 1)",
            "k_rope.expand(*k_nope.shape[:-1], R)",
        )
        first = self.some(4)
        order = ("{1}", "{0}") if first else ("{0}", "{1}")
        parts = ", ".join(order)
        self.add(f"q = torch.cat([{parts.format('q_nope', 'q_rope')}], -1)")
        form = self.promised(("cat", "fill"), ("pad",), 8)
        if form == "cat":
            self.add(f"k = torch.cat([{parts.format('k_nope', shared)}], -1)")
        elif form == "fill":
            self.add(
                self.pick("k = k_nope.new_empty(b, H, t, N + R)", "k = torch.empty(b, H, t, N + R, dtype=k_nope.dtype)")
            )
            cut = ("R:", ":R") if first else (":N", "N:")
            if self.R:
                self.add(f"k[..., {cut[0]}] = k_nope", f"k[..., {cut[1]}] = k_rope")
            else:
                self.add("k[..., :] = k_nope")
        else:
            pads = ("(R, 0)", "(0, N)") if first else ("(0, R)", "(N, 0)")
            self.add(f"k = F.pad(k_nope, {pads[0]}) + F.pad(k_rope, {pads[1]})")
        self.noise("q", "k", "v")

    # ---- mask and attention

    def mask(self, cache: str, attention: str) -> str:
        """Writes `mask`; -> its kind: `` (none), `flag`, `bool`, `float`."""
        offset = "start" if cache == "static" else "t - s"
        self.add("row, col = torch.arange(s)[:, None], torch.arange(t)[None, :]")
        causal = f"col <= row + {offset}"
        if cache == "static":
            kinds = ("causal",)
        elif cache == "past":
            kinds = ("causal", "none", "bias")
        else:
            kinds = (
                "flag",
                "none",
                "causal",
                "padded",
                "prefix",
                "packed",
                "heads",
                "bias",
                "window",
                "shifted",
                "keep_only",
            )
        kind = self.pick(*kinds)
        if kind == "none" or kind == "flag" and attention == "sdpa":
            return "" if kind == "none" else "flag"
        if kind == "bias":
            self.add(f"mask = {self.weight('bias', '64', '64')}[:s, :t]")
            if self.train:
                self.odd.append("bias")
            return "float"
        self.add(f"seen = {causal}" + (" + 1" if kind == "shifted" else ""))
        if kind == "window":
            self.add("seen = seen & (col > row - 2)")
        if kind in ("shifted", "window"):  # which may be nothing else than causal for a short sequence
            self.odd.append(kind)
        if kind in ("padded", "keep_only"):
            self.add("keep = torch.arange(t)[None, :] < lengths[:, None]")
            self.add("seen = seen & keep[:, None, None, :]" if kind == "padded" else "seen = keep[:, None, None, :]")
        if kind == "prefix":
            self.add("seen = seen | (col < 3)")
        if kind == "packed":
            self.add("group = torch.arange(t) // 3", "seen = seen & (group[:s, None] == group[None, :])")
        if kind == "heads":
            self.add("seen = col <= row + torch.arange(H)[:, None, None]")
        form = self.pick("bool", "where", "fill", "minus", "min")
        if form == "bool":
            self.add("mask = seen")
            return "bool"
        dtype = "q.dtype"
        least = "torch.finfo(q.dtype).min" if form == "min" else "float('-inf')"
        if form == "fill":
            self.add(f"mask = torch.zeros(seen.shape, dtype={dtype}).masked_fill(~seen, {least})")
        elif form == "minus" and kind in ("causal", "flag") and cache != "static":
            self.add(f"mask = torch.full((s, t), {least}, dtype={dtype}).triu(1 + {offset})")
        elif form == "minus":
            self.add(f"mask = torch.where(seen, torch.zeros((), dtype={dtype}), torch.tensor({least}, dtype={dtype}))")
        else:
            self.add(f"mask = torch.full(seen.shape, {least}, dtype={dtype}).masked_fill(seen, 0)")
        if kind != "heads" and self.some(4):
            self.add("mask = mask.expand(b, 1, s, t)")
        return "float"

    def attend(self, form: str, mask: str) -> None:
        """Writes `o`, [B, H, S, V]."""
        scale = self.pick("(N + R) ** -0.5", "0.3", "None") if form == "sdpa" else self.pick("(N + R) ** -0.5", "0.3")
        if form == "sdpa":
            extra = {"": "", "flag": ", is_causal=True"}.get(mask, ", attn_mask=mask")
            self.add(f"o = F.scaled_dot_product_attention(q, k, v{extra}, scale={scale})")
            return
        if form == "terms":
            cut = ("q[..., :N] @ k[..., :N].transpose(2, 3)", "q[..., N:] @ k[..., N:].transpose(2, 3)")
            self.add(f"scores = ({cut[0]} + {cut[1]}) * {scale}")
        elif form == "bmm":
            self.add("scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))")
            self.add(f"scores = scores.view(b, H, s, t) * {scale}")
        else:
            product = {
                "eager": "torch.matmul(q, k.transpose(2, 3))",
                "einsum": "torch.einsum('bhsd,bhtd->bhst', q, k)",
            }[form]
            self.add(
                self.pick(
                    f"scores = {product} * {scale}",
                    f"scores = {product} / (1 / {scale})",
                    f"scores = {scale} * {product}",
                )
            )
        if mask == "bool":
            self.add(
                self.pick(
                    "scores = scores.masked_fill(~mask, float('-inf'))",
                    "scores = torch.where(mask, scores, float('-inf'))",
                )
            )
        elif mask == "float":
            self.add("scores = scores + mask")
        soft = self.pick(
            "torch.softmax(scores, -1, dtype=wide).to(work)", "F.softmax(scores, dim=-1)", "scores.softmax(-1)"
        )
        self.add(f"p = {soft}.to(v.dtype)")
        if form == "einsum":
            self.add(
                self.pick(
                    "o = torch.einsum('bhst,bhtv->bhsv', p, v)",
                    "o = torch.einsum('bhst,bhtv->bshv', p, v).transpose(1, 2)",
                )
            )
        elif form == "bmm":
            self.add("o = torch.bmm(p.flatten(0, 1), v.flatten(0, 1)).view(b, H, s, V)")
        else:
            self.add("o = p @ v")

    # ---- changes of meaning

    def meddle(self, point: str) -> None:
        """At some points of the module, once in a while, a change after which it is no such attention."""
        changes = _CHANGES.get(point, ())
        if not changes or not self.some(9):
            return
        name, line, certain = self.pick(*changes)
        self.add(line)
        (self.wrong if certain(self) else self.odd).append(name)


def _always(w: AttentionWriter) -> bool:
    return True


def _never(w: AttentionWriter) -> bool:
    return False


def _heads(w: AttentionWriter) -> bool:
    return w.H > 1


def _rotated_heads(w: AttentionWriter) -> bool:
    return w.H > 1 and w.R > 0


# (name, statement, whether a match is certainly wrong then): others are compared with eager alone.
_CHANGES = {
    "up": (
        ("heads of keys turned", "k_nope = k_nope.roll(1, 1)", _heads),
        ("heads of values turned", "v = v.flip(1)", _heads),
        ("keys moved by one", "k_nope = k_nope.roll(1, 2)", _never),
        ("values of another request", "v = v.flip(0)", _never),
        ("values rotated", "v = v * torch.arange(1, t + 1)[:, None].to(work)", _always),
        ("keys scaled by head", "k_nope = k_nope * torch.arange(1, H + 1)[:, None, None].to(work)", _always),
        ("rope key by head", "k_rope = k_rope * torch.arange(1, H + 1)[:, None, None].to(work)", _never),
        ("columns reversed", "k_nope = k_nope.flip(-1)", _always),
        ("a column twice", "k_nope = torch.cat([k_nope[..., 1:], k_nope[..., :1]], -1)", _always),
        ("latent changed behind its use", "latent.mul_(2)", _never),
        ("values changed in place", "v[..., :1] = 0", _always),
        ("keys changed in place", "k_nope.add_(1)", _always),
        ("first key hidden", "k_rope = torch.cat([k_rope[:, :, :1] * 0, k_rope[:, :, 1:]], 2)", _never),
        ("values of a changed latent", "v = v + 0.1", _always),
        ("queries turned", "q_nope = q_nope.roll(1, 1)", _never),
    ),
    "scores": (
        ("keys turned around", "k = k.flip(1)", _heads),
        ("a row left out", "k = torch.cat([k[:, :, 1:], k[:, :, :1]], 2)", _never),
        ("scores used twice", "v = v + k[..., :1]", _always),
        ("queries scaled by head", "q = q * torch.arange(1, H + 1)[:, None, None].to(work)", _never),
        ("keys scaled", "k = k * 2", _always),
    ),
    "out": (
        ("output changed in place", "o[:, :, :1] = 0", _never),
        ("keys added to the output", "o = o + v.mean(2, keepdim=True)", _never),
        ("output doubled", "o.mul_(2)", _never),
        ("latent overwritten at the end", "latent.zero_()", _never),
        ("input overwritten at the end", "x.zero_()", _never),
    ),
}


@st.composite
def attentions(draw) -> Program:  # type: ignore[no-untyped-def]
    """A module that holds one attention."""
    w = AttentionWriter(draw)
    constants = w.sizes()
    w.work, w.wide = w.pick(*PRECISIONS)
    cache = w.pick("none", "none", "none", "static", "past")
    w.train = cache != "static" and w.some(4)
    lengths = cache == "none" and w.some(4)
    form = w.promised(("sdpa", "sdpa", "eager", "einsum"), ("bmm", "terms"), 8)
    w.add("b, s, _ = x.shape")
    w.query()
    w.down()
    w.rope()
    w.cache(cache)
    w.up()
    w.meddle("up")
    w.key()
    w.meddle("scores")
    mask = w.mask(cache, form)
    w.attend(form, mask)
    w.meddle("out")
    o = w.pick(
        "o.transpose(1, 2).flatten(2)",
        "o.transpose(1, 2).reshape(b, s, H * V)",
        "o.permute(0, 2, 1, 3).contiguous().view(b, s, -1)",
    )
    w.add(f"y = F.linear({o}, {w.weight('o', 'D', 'H * V')})")
    return _program(w, constants, cache, lengths)


def _program(w: AttentionWriter, constants: list[str], cache: str, lengths: bool) -> Program:
    arguments = "x, lengths=None, start=0"
    result = w.pick("y", "y", "y", "o", "y, latent")
    S = w.S
    if cache == "static":
        S = min(S, 6)
        calls = [f"(random(1, B, {S}, D), None, torch.tensor(0))", f"(random(2, B, 1, D), None, torch.tensor({S}))"]
        if w.some(3):
            calls.append(f"(random(3, B, 2, D), None, torch.tensor({S - 1}))")
    elif cache == "past":
        arguments = "x, past_c, past_r, start=3"
        S = min(S, 2)
        result = "y, latent, k_rope"
        calls = [f"(random(1, B, {S}, D), random(2, B, 4, C), random(3, B, 1, 4, R))"]
    else:
        counts = "torch.arange(1, B + 1) * 2"
        calls = [f"(random(1, B, {S}, D), {counts})"]
        if lengths:
            calls = [f"(random(1, B, {n}, D), {counts})" for n in (max(S, 3), S + 4)]
    autocast = w.work == "float32" and w.some(3)
    plain = not w.odd and not w.wrong
    expect = {}
    if w.wrong:
        expect = {"mla": False}
    elif plain and not autocast:
        expect = {"mla": True}
    return Program(
        title="; ".join(["attention", f"cache {cache}", *w.odd, *(f"wrong: {n}" for n in w.wrong)]),
        constants=tuple(constants),
        init=tuple(w.init),
        forward=tuple(w.lines),
        arguments=arguments,
        result=result,
        calls=tuple(calls),
        work=w.work,
        wide=w.wide,
        train=w.train,
        lengths=lengths,
        autocast=autocast,
        inner="aot_eager" if w.train else "eager",
        expect=expect,
    )

"""Draws layers of experts behind a router in the ways people write them, and ways that compute something else.

Suffixes in the generated text: T tokens, D width, E experts, N experts that the router knows (the last N - E return
their tokens), K choices, W expert width, G groups, M = T * K rows.
"""

from __future__ import annotations

from hypothesis import strategies as st

from tests.zoo.generator.program import Program, Writer

PRECISIONS = (("float64", "float64"),) * 4 + (("float32", "float32"), ("bfloat16", "float32"))
# B, S, D, W, E, K, G. Few, so that torch need not work out the shapes of every module anew.
SIZES = ((1, 5, 8, 7, 6, 2, 2),) * 3 + (
    *((1, 4, 4, 4, 4, 4, 2),) * 2,
    (1, 6, 8, 7, 6, 1, 2),
    (2, 3, 5, 8, 8, 3, 4),
    (1, 1, 8, 7, 6, 1, 3),
    (2, 6, 8, 4, 3, 2, 2),
    (1, 11, 8, 7, 4, 1, 2),
)
_IMPORT = "import transformers.integrations.moe  # registers its grouped product"


class LayerWriter(Writer):
    """One router and its experts; `idx` and `w` are [T, K], `rows` are what the experts read."""

    def sizes(self) -> list[str]:
        self.B, self.S, D, W, self.E, self.K, self.G = self.pick(*SIZES)
        self.returning = 2 if self.some(4) else 0
        return [_IMPORT, f"D, W, E, K, N = {D}, {W}, {self.E}, {self.K}, {self.E + self.returning}"]

    # ---- router

    def router(self) -> None:
        gate = self.weight("gate", "N", "D")
        self.add(
            self.pick(
                f"logits = F.linear(x, {gate})",
                f"logits = F.linear(x.to(wide), {gate}.to(wide))",
                f"logits = x @ {gate}.t()",
            )
        )
        self.meddle("logits")
        kind = self.pick("softmax", "sigmoid", "chosen")
        if kind == "chosen":
            self.add(f"w, idx = {self.pick('torch.topk(logits, K, dim=-1)', 'logits.topk(K)')}")
            self.add(self.pick("w = w.softmax(-1)", "w = F.softmax(w, dim=1)"))
            self.normalised(self.some(5))
            return
        scores = {
            "softmax": ("logits.softmax(-1)", "F.softmax(logits, dim=1, dtype=wide)"),
            "sigmoid": ("logits.sigmoid()",),
        }
        self.add(f"scores = {self.pick(*scores[kind])}")
        choice = "scores"
        if self.some(2):
            self.init.append("self.register_buffer('bias', torch.linspace(-0.2, 0.3, N, dtype=work))")
            self.add(self.pick("choice = scores + self.bias", "choice = scores + self.bias.unsqueeze(0)"))
            choice = "choice"
        limited = not self.returning and self.E % self.G == 0 and self.E // self.G >= 2 and self.some(2)
        if limited:
            self.groups(choice)
        source = "limited" if limited else choice
        ordered = self.pick("", ", sorted=False", ", dim=-1")
        if choice == "scores" and self.some(2):
            self.add(f"w, idx = torch.topk({source}, K{ordered})")
        else:
            self.add(f"idx = torch.topk({source}, K{ordered})[1]")
            self.add(self.pick("w = scores.gather(1, idx)", "w = torch.gather(scores, -1, idx)"))
        self.normalised(self.some(2))

    def groups(self, choice: str) -> None:
        kept = self.pick(1, self.G - 1)
        if kept * (self.E // self.G) < self.K:
            kept = self.G - 1
        if kept * (self.E // self.G) < self.K:
            self.odd.append("fewer experts than choices")
        fill = self.pick("float('-inf')", "0.0")
        self.add(
            self.pick(
                f"best = {choice}.view(-1, {self.G}, E // {self.G}).topk(2, dim=-1)[0].sum(-1)",
                f"best = {choice}.view(-1, {self.G}, E // {self.G}).max(-1)[0]",
                f"best = {choice}.reshape(-1, {self.G}, E // {self.G}).amax(-1)",
                f"best = {choice}.view(-1, {self.G}, E // {self.G}).max(dim=-1).values",
            ),
            f"chosen = best.topk({kept}, dim=-1{self.pick('', ', sorted=False')})[1]",
            self.pick(
                "open = torch.zeros_like(best).scatter_(1, chosen, 1)",
                "open = torch.zeros_like(best).scatter(1, chosen, 1)",
            ),
            f"open = open.unsqueeze(-1).expand(-1, {self.G}, E // {self.G}).reshape(-1, E)",
            f"limited = {choice}.masked_fill(~open.bool(), {fill})",
        )

    def normalised(self, again: bool) -> None:
        if again and (self.K > 1 or not self.train):  # else the gradient of a weight w / w is rounding alone
            self.add(
                self.pick(
                    "w = w / w.sum(-1, keepdim=True)",
                    "w = w / (w.sum(dim=-1, keepdim=True) + 1e-20)",
                    "w /= w.sum(-1, keepdim=True) + 1e-9",
                )
            )
        if self.some():
            self.add("w = w * 2.5")
        self.add(self.pick("w = w.to(x.dtype)", "w = w.to(work)"))

    # ---- experts

    def weights(self, form: str) -> None:
        joint = self.pick("joint", "joint", "interleaved", "apart")
        self.joint = joint
        self.stored = self.pick("out_in", "in_out")
        shape = (lambda o, i: ("E", o, i)) if self.stored == "out_in" else (lambda o, i: ("E", i, o))
        if joint == "apart":
            self.weight("w1", *shape("W", "D"))
            self.weight("w3", *shape("W", "D"))
        else:
            self.weight("w13", *shape("2 * W", "D"))
        self.weight("w2", *shape("D", "W"))
        self.bias = form in ("grouped", "batched") and not self.returning and joint != "apart" and self.some(6)
        if self.bias:
            self.weight("b13", "E", "2 * W")
            self.weight("b2", "E", "D")

    def product(self, form: str, rows: str, weight: str, ids: str) -> str:
        out_in = self.stored == "out_in"
        if form == "grouped":
            turned = ".transpose(1, 2)" if out_in else ""
            return f"torch.ops.transformers.grouped_mm_fallback({rows}, {weight}{turned}, ends)"
        if form == "batched":
            if out_in:
                return self.pick(
                    f"torch.bmm({weight}[{ids}], {rows}.unsqueeze(-1)).squeeze(-1)",
                    f"torch.matmul({weight}[{ids}], {rows}[..., None])[..., 0]",
                )
            return f"torch.bmm({rows}.unsqueeze(1), {weight}[{ids}]).squeeze(1)"
        if form == "dense":
            equation = f"{'ti' if rows == 'x' else 'tei'},{'eoi' if out_in else 'eio'}->teo"
            return f"torch.einsum('{equation}', {rows}, {weight})"
        return f"F.linear({rows}, {weight}[e])" if out_in else f"{rows} @ {weight}[e]"

    def network(self, form: str, rows: str, ids: str = "ids") -> list[str]:
        """Statements from `rows` to `z`."""
        lines = []
        if self.joint == "apart":
            lines.append(
                f"gate, up = {self.product(form, rows, 'self.w1', ids)}, {self.product(form, rows, 'self.w3', ids)}"
            )
        else:
            lines.append(f"both = {self.product(form, rows, 'self.w13', ids)}")
            if self.bias:
                lines.append(f"both = both + self.b13[{ids}]")
            if self.joint == "joint":
                lines.append(
                    self.pick(
                        "gate, up = both.chunk(2, -1)",
                        "gate, up = both[..., :W], both[..., W:]",
                        "gate, up = both.split(W, dim=-1)",
                    )
                )
            else:
                lines.append("gate, up = both[..., ::2], both[..., 1::2]")
        act = self.pick(
            "F.silu(gate)", "F.gelu(gate)", "F.gelu(gate, approximate='tanh')", "gate * torch.sigmoid(gate)", "clamped"
        )
        if act == "clamped":
            lines.append("gate, up = gate.clamp(max=0.7), up.clamp(min=-0.7, max=0.7)")
            lines.append("h = (up + 1) * (gate * torch.sigmoid(gate * 1.702))")
        else:
            lines.append(self.pick(f"h = {act} * up", f"h = up * {act}"))
        lines += self.meddled("hidden")
        lines.append(f"z = {self.product(form, 'h', 'self.w2', ids)}")
        if self.bias:
            lines.append(f"z = z + self.b2[{ids}]")
        return lines

    def sort(self) -> None:
        sort = self.pick("perm = torch.argsort(ids)", "ids, perm = torch.sort(ids)", "perm = ids.argsort(stable=True)")
        self.add("ids = idx.reshape(-1)", sort)
        if not sort.startswith("ids,"):
            self.add(self.pick("ids = ids[perm]", "ids = ids.gather(0, perm)"))
        self.meddle("perm")
        some = ("histc", "equal", "searchsorted")  # these leave out ids of no product
        counts = self.pick(*some, *(() if self.returning else ("one_hot", "scatter", "bincount")))
        if counts == "searchsorted":
            self.add("ends = torch.searchsorted(ids, torch.arange(E), right=True).int()")
        else:
            text = {
                "histc": "torch.histc(ids.to(torch.float32), bins=E, min=0, max=E - 1)",
                "one_hot": "F.one_hot(idx, E).sum((0, 1))",
                "equal": "(idx.reshape(-1, 1) == torch.arange(E)).sum(0)",
                "scatter": "torch.zeros(E, dtype=torch.int64).scatter_add_(0, ids, torch.ones_like(ids))",
                "bincount": "torch.bincount(ids, minlength=E)",
            }[counts]
            if counts == "bincount":
                self.odd.append("bincount")
            self.add(
                f"counts = {text}",
                "ends = counts.cumsum(0).to(torch.int32)"
                if self.some(2)
                else "ends = torch.cumsum(counts, 0, dtype=torch.int32)",
            )
        self.meddle("ends")

    def grouped(self) -> None:
        self.sort()
        self.add(
            self.pick(
                "rows = x[perm // K]",
                "rows = x.index_select(0, perm // K)",
                "rows = x.repeat_interleave(K, dim=0)[perm]",
                "rows = x[torch.div(perm, K, rounding_mode='floor')]",
                "rows = x.gather(0, (perm // K).unsqueeze(-1).expand(-1, D))",
                *(("rows = x[perm]",) if self.K == 1 else ()),
            )
        )
        self.meddle("rows")
        self.add(*self.network("grouped", "rows"))
        self.returned("ids")
        early = self.some(2)
        if early:
            self.add(
                self.pick(
                    "z = z * w.reshape(-1)[perm].unsqueeze(-1)",
                    "z = z * w.view(-1)[perm][:, None]",
                    "z.mul_(w.reshape(-1)[perm].unsqueeze(-1))",
                )
            )
        self.meddle("z")
        back = self.pick("inverse", "argsort", "scatter", "rows", "add")
        if back == "add" and early:
            self.add(
                self.pick(
                    "y = torch.zeros_like(x).index_add_(0, perm // K, z)",
                    "y = torch.zeros_like(x).scatter_add(0, (perm // K).unsqueeze(-1).expand(-1, D), z)",
                    "y = torch.zeros_like(x).index_add(0, perm // K, z)",
                )
            )
            return
        if back == "rows":
            self.add("flat = torch.zeros_like(z)", "flat[perm] = z", "z = flat")
        elif back == "argsort":
            self.add("z = z[torch.argsort(perm)]")
        elif back == "scatter":
            self.add("z = z[torch.zeros_like(perm).scatter_(0, perm, torch.arange(T * K))]")
        else:
            self.add("inverse = torch.empty_like(perm)", "inverse[perm] = torch.arange(T * K)", "z = z[inverse]")
        self.summed(early)

    def batched(self) -> None:
        self.add("ids = idx.reshape(-1)")
        self.add(
            self.pick(
                "rows = x.repeat_interleave(K, 0)",
                "rows = x[torch.arange(T * K) // K]",
                "rows = x.unsqueeze(1).expand(-1, K, -1).reshape(-1, D)",
                *(("rows = x",) * 3 if self.K == 1 else ()),
            )
        )
        self.meddle("rows")
        if self.returning:
            self.add(
                self.pick(
                    "ids = ids.clamp(max=E - 1)",
                    "ids = ids.masked_fill(ids >= E, 0)",
                    "ids = torch.where(ids < E, ids, 0)",
                )
            )
        self.add(*self.network("batched", "rows"))
        self.returned("idx.reshape(-1)")
        early = self.some(2)
        if early:
            self.add("z = z * w.reshape(-1, 1)")
        self.meddle("z")
        self.summed(early)

    def returned(self, ids: str) -> None:
        """Rows of experts past the last product hold their tokens."""
        if self.returning:
            self.add(f"none = ({ids} >= E).unsqueeze(-1)", "own = rows")
            self.meddle("own")
            self.add(
                self.pick(
                    "z = torch.where(none, own, z)",
                    "z = torch.where(~none, z, own)",
                    f"z = torch.where(({ids} < E)[:, None], z, own)",
                )
            )

    def summed(self, early: bool) -> None:
        self.add("z = z.view(T, K, D)")
        self.meddle("sum")
        if early:
            self.add(self.pick("y = z.sum(1)", "y = z.sum(dim=-2)"))
        else:
            self.add(
                self.pick(
                    "y = (z * w.unsqueeze(-1)).sum(1)",
                    "y = torch.bmm(w.unsqueeze(1), z).squeeze(1)",
                    "y = torch.einsum('tkd,tk->td', z, w)",
                    "y = z.mul(w[..., None]).sum(dim=1)",
                )
            )

    def loop(self) -> None:
        lines = ["y = torch.zeros_like(x)"]
        if self.some(2):
            body = ["at, k = torch.where(idx == e)", *self.network("loop", "x[at]")]
            body.append(
                self.pick(
                    "y.index_add_(0, at, z * w[at, k, None])",
                    "y.index_add_(0, at, w[at, k].unsqueeze(-1) * z)",
                    "y[at] += z * w[at, k, None]",
                )
            )
            if body[-1].startswith("y[at]"):
                self.odd.append("loop with index_put")
        else:
            body = self.network("loop", "x")
            body.append(
                self.pick(
                    "y = y + z * (w * (idx == e)).sum(-1, keepdim=True)",
                    "y = y + z * (w * (idx == e)).sum(-1).unsqueeze(-1)",
                )
            )
        lines.append("for e in range(E):\n    " + "\n    ".join(body))
        self.add(*lines)

    def dense(self) -> None:
        self.odd.append("every expert for every token")
        self.add("full = torch.zeros(T, E, dtype=x.dtype).scatter(1, idx, w)")
        self.add(*self.network("dense", "x"))
        self.add(self.pick("y = torch.einsum('teo,te->to', z, full)", "y = (z * full.unsqueeze(-1)).sum(1)"))

    # ---- changes of meaning

    def meddled(self, point: str) -> list[str]:
        changes = _CHANGES.get(point, ())
        if not changes or not self.some(10):
            return []
        name, line, certain = self.pick(*changes)
        (self.wrong if certain(self) else self.odd).append(name)
        return [line]

    def meddle(self, point: str) -> None:
        self.add(*self.meddled(point))


def _always(w: LayerWriter) -> bool:
    return True


def _never(w: LayerWriter) -> bool:
    return False


def _several(w: LayerWriter) -> bool:
    return w.K > 1


def _several_rows(w: LayerWriter) -> bool:
    return w.B * w.S * w.K > 1


_CHANGES = {
    "logits": (
        ("logits scaled", "logits = logits * 2", _never),
        ("logits by position", "logits = logits * torch.arange(1, T + 1).to(logits.dtype)[:, None]", _never),
        ("logits turned in place", "logits.neg_()", _never),
    ),
    "perm": (
        ("another permutation", "perm = perm.roll(1)", _several_rows),
        ("ids of another row", "ids = ids.roll(1)", _never),
        ("ids moved by one", "ids = (ids + 1) % E", _never),
        ("an order turned in place", "perm.copy_(perm.flip(0))", _several_rows),
    ),
    "ends": (
        ("ends moved", "ends = torch.cat([ends[1:], ends[-1:]])", _always),
        ("a capacity", "ends = ends.clamp(max=3)", _always),
        ("one row more", "ends = (ends + 1).clamp(max=T * K)", _always),
        ("ends changed in place", "ends[0] = 0", _always),
    ),
    "rows": (  # with one choice a token, rows may be anything that has one row a token
        ("rows of the next token", "rows = rows.roll(1, 0)", _several),
        ("rows scaled by their weights", "rows = rows * w.reshape(-1, 1)", _several),
        ("rows changed in place", "rows[:1] = 0", _several),
        ("tokens changed behind the gathering", "x.mul_(2)", _never),
    ),
    "own": (
        ("tokens of the next row returned", "own = own.roll(1, 0)", _several_rows),
        ("tokens returned twice", "own = own * 2", _always),
        ("tokens of an expert returned", "none = none | (idx.reshape(-1, 1) == 0)", _never),
        ("tokens turned", "own = own.flip(1)", _always),
    ),
    "hidden": (
        ("activation scaled", "h = h * 1.01", _always),
        ("columns scaled", "h = h * torch.arange(1, W + 1).to(h.dtype)", _always),
        ("up used alone", "h = h + 0 * up", _never),
        ("activation twice", "h = F.silu(h)", _always),
        ("columns turned", "h = h.flip(-1)", _always),
        ("gate changed behind its use", "gate.zero_()", _never),
        ("hidden rounded", "h = h.to(torch.float16).to(x.dtype)", _never),
    ),
    "z": (  # weighed results of one choice are the layer's result, and what follows stays as it is
        ("results of the next row", "z = z.roll(1, 0)", _several),
        ("results scaled by row", "z = z * torch.arange(1, z.shape[0] + 1).to(z.dtype)[:, None]", _never),
        ("results dropped", "z = z.masked_fill((torch.arange(z.shape[0]) > 4)[:, None], 0)", _several),
        ("something added", "z = z + 0.1", _several),
        ("weights changed later", "w.mul_(2)", _never),
    ),
    "sum": (
        ("choices as tokens", "z = z.reshape(K, T, D).transpose(0, 1)", _never),
        ("choices turned", "z = z.flip(1)", _never),
        ("one choice left out", "z = z * (torch.arange(K) > 0)[:, None]", _never),
    ),
}


@st.composite
def layers(draw) -> Program:  # type: ignore[no-untyped-def]
    """A module that holds one router and the experts behind it."""
    w = LayerWriter(draw)
    constants = w.sizes()
    w.work, w.wide = w.pick(*PRECISIONS)
    w.train = train = w.some(4)
    form = w.pick("grouped", "grouped", "batched", *(() if w.returning else ("loop", "dense")))
    lengths = form in ("grouped", "batched") and w.some(4)
    w.add("shape = x.shape", "x = x.reshape(-1, D)", "T = x.shape[0]")
    w.weights(form)
    if train and w.joint == "apart":
        w.odd.append("gate and up trained apart")
    w.router()
    routed = (list(w.odd), list(w.wrong))
    getattr(w, form)()
    if w.some(4):
        shared = w.weight("shared", "D", "D")
        w.add(f"y = y + F.linear(x, {shared})")
    w.add("y = y.view(shape)")
    S = w.S
    calls = [f"(random(1, {w.B}, {n}, D),)" for n in ((max(S, 3), S + 4) if lengths else (S,))]
    plain = not w.odd and not w.wrong
    expect = {}
    if w.wrong:
        expect["experts"] = False
    elif plain and w.work == "float64":
        expect["experts"] = True
    if w.work == "float64" and not train and not routed[0] and plain:
        expect["route"] = True
    unordered = any("K, sorted=False" in line for line in w.lines)  # then nobody says which choice is which
    result = w.pick("y", "y", "y", "y, logits", *(() if unordered else ("y, idx", "y, w")))
    if result != "y":
        expect.pop("route", None)
    return Program(
        title="; ".join([f"experts, {form}", *w.odd, *(f"wrong: {n}" for n in w.wrong)]),
        constants=tuple(constants),
        init=tuple(w.init),
        forward=tuple(w.lines),
        arguments="x",
        result=result,
        calls=tuple(calls),
        work=w.work,
        wide=w.wide,
        train=train,
        lengths=lengths,
        inner="aot_eager" if train else "eager",
        expect=expect,
    )

"""The pieces of random expert programs (`programs`): Python source, each with the lines that it needs around it.

A piece is a paragraph. The first sign of a line names its section: ``t`` the top of the program, ``c`` the class,
``i`` its ``__init__``, ``f`` its ``forward``, ``k`` the function that changes things between two steps. ``$`` becomes
the piece's number in its program, and ``<<a||b>>`` one of its choices. Long lines go on behind a backslash.

``forward`` has ``self``, ``batch``, ``losses`` and ``x``, the rows ``[N, (S,) W]`` so far. ``odd($, usual, other)``
within ``__init__`` is ``other`` for one of the experts, for some programs.
"""

from __future__ import annotations

# Pieces that can run as one.
TENSORS = """
i self.l$ = nn.Linear(W, W, bias=odd($, True, <<True||False>>))
f x = self.l$(x)

i self.p$ = nn.Parameter(torch.rand(W) + 0.5)
f x = x <<*||+||-||/>> self.p$

i self.p$ = nn.Parameter(torch.rand(W), requires_grad=odd($, True, False))
i self.q$ = nn.Parameter(torch.rand(()))
f x = torch.addcmul(x, self.p$, self.q$) if <<True||False>> else x + self.p$ * self.q$

i self.n$ = nn.LayerNorm(W, eps=odd($, 1e-5, 0.3))
f x = self.n$(x)

i self.r$ = odd($, 0.5, <<0.25||-0.5||0.0||2||True>>)
f x = x + self.r$ * torch.<<tanh||sin||sigmoid>>(x)

f x = F.<<relu||gelu||silu||softplus||elu||leaky_relu||mish||hardtanh||logsigmoid>>(x)

f x = x - x.mean(-1, keepdim=True)

f x = <<torch.softmax(x, dim=-1)||x.softmax(-1)||F.log_softmax(x, -1)||F.normalize(x, dim=-1)||\
x / (1 + x.norm(dim=-1, keepdim=True))>>

f a$, b$ = x.chunk(2, dim=-1)
f x = torch.cat((b$, torch.sigmoid(a$) * b$), -1)

f x = x.<<flip(-1)||roll(1, -1)||cumsum(-1)||clamp(-1, 1)||sort(-1).values||abs()||square()||neg()||exp().log1p()>>

f x = <<torch.where(x > 0, x, 0.1 * x)||x.masked_fill(x < 0, 0.5)||torch.maximum(x, torch.zeros_like(x))||\
x * (x > 0)>>

f if batch.mask is not None and batch.mask.dtype == torch.bool:
f     x = <<x.masked_fill(~batch.mask.unsqueeze(-1), 0.0)||torch.where(batch.mask[..., None], x, x * 0.5)||\
x * batch.mask.unsqueeze(-1)>>
f elif batch.mask is not None:
f     x = x * batch.mask.unsqueeze(-1)

f x = x * batch.context["scale"]

f x = x + batch.context["table"][<<1||-1||0>>]

f x = <<x @ batch.context["square"]||torch.matmul(x, batch.context["square"].T)||\
F.linear(x, batch.context["square"])>>

i self.e$ = nn.Embedding(5, W)
f e$ = self.e$(batch.context["index"])
f x = x + (e$ if x.dim() == 2 else e$.unsqueeze(1))

i self.p$ = nn.Parameter(torch.rand(W, W))
f x = <<x @ self.p$||torch.einsum("...d,de->...e", x, self.p$)||torch.matmul(x, self.p$.t())||\
F.linear(x, self.p$)||F.linear(x, self.p$ + self.p$.T)>>

i self.p$ = nn.Parameter(torch.rand(2, W))
f x = x + <<self.p$.sum(0)||self.p$[1]||self.p$.mean(0) * self.p$[0].norm()||torch.softmax(self.p$, 0)[0]>>

f x = x.<<reshape(x.shape[0], -1)||flatten(1)||view(len(x), -1)>>.<<view||reshape>>(x.shape)

f x = x.unflatten(-1, (2, 2)).<<transpose(-1, -2)||mT||flip(-2)>>.flatten(-2)

i self.register_buffer("b$", torch.full((W,), odd($, 1.5, 0.5)), persistent=<<True||False>>)
f x = x * self.b$

i self.s$ = nn.ModuleList([nn.Linear(W, W) for _ in range(odd($, 2, <<2||1||3>>))])
f for layer$ in self.s$:
f     x = torch.tanh(layer$(x))

i self.s$ = nn.Sequential(nn.Linear(W, W), nn.<<ReLU||Tanh||\
GELU>>(), nn.Linear(W, W), odd($, nn.Identity(), <<nn.Identity()||nn.ReLU()>>))
f x = x + self.s$(x)

f x = x.clone()
f x[..., <<0||-1||1:3||::2>>] = <<0.5||-1||self.number>>

f x = x * 1
f x <<+=||*=||-=>> <<0.5||x.detach()||batch.context["scale"]>>

f x = x * 1
f x.<<mul_(2)||add_(batch.hidden)||tanh_()||clamp_(min=-1.0)||sub_(1)>>

f with torch.no_grad():
f     d$ = torch.<<tanh||sigmoid>>(x)
f x = x + d$

f x = x + x.detach() * <<0.5||2.0>>

f x = x <<+||*>> batch.hidden

f with torch.set_grad_enabled(<<True||False||self.training||torch.is_grad_enabled()>>):
f     d$ = x * 2
f x = x - d$

i self.g$ = nn.Parameter(torch.rand(1))
f losses["l$"] = (x * self.g$).<<mean()||pow(2).mean()||abs().sum()>>

i self.g$ = nn.Parameter(torch.rand(W))
f losses["l$"] = <<self.g$.pow(2).sum()||F.mse_loss(x, batch.hidden * self.g$)||(self.g$ * 1).mean()||\
(x * self.g$).detach().mean()>>

f losses["l$"] = F.cross_entropy(x.reshape(-1, W), (batch.context["index"] % \
W).repeat_interleave(x.reshape(-1, W).shape[0] // x.shape[0]))

f if self.training:
f     losses["l$"] = x.<<mean()||std()||square().mean()>>

f x = x + torch.<<arange(W)||linspace(0, 1, W)||ones(W)||eye(W)[0]>>.to(x.dtype)

f x = torch.complex(x, x * 0.5)
f x = <<x.conj()||x * 1j||x.abs() * x||torch.conj(x) * x>>.<<real||imag||abs()>>

i self.c$ = nn.Parameter(torch.complex(torch.rand(W), torch.rand(W)))
f x = (x * self.c$).<<real||imag||abs()>> if <<True||False>> else torch.view_as_real(x * self.c$.conj()).sum(-1)

f x = <<x.double().to(x.dtype)||x.type_as(batch.hidden)||x.to(batch.hidden)||x.contiguous()>>

i self.w$ = nn.Parameter(torch.rand(W, W))
i self.tied$ = self.w$
f x = x @ self.w$ + x @ self.tied$.T

i self.u$ = nn.Linear(W, 1)

f x = x + torch.zeros_like(x[..., :1]) + torch.<<ones_like(x)||full_like(x, 0.5)||empty_like(x).fill_(1.0)>>

f top$ = x.topk(2, dim=-1).values
f x = x + top$.sum(-1, keepdim=True)

f i$ = x.<<argsort(-1)||sort(-1).indices>>
f x = x.gather(-1, i$)

f x = torch.stack([x, x * 2], <<-1||-2>>).<<sum||mean||amax>>(<<-1||-2>>)

f x = F.<<pad(x, (1, 1))[..., 1:-1]||pad(x, (1, 0))[..., :-1]||glu(torch.cat((x, x), -1), -1)>>

i self.d$ = nn.Dropout(<<0.5||0.0>>)
f x = self.d$(x)

f x = F.dropout(x, <<0.5||0.1>>, training=<<self.training||False>>)

i self.s$ = nn.utils.parametrizations.weight_norm(nn.Linear(W, W))
f x = self.s$(x)
"""

# Python that does nothing to other calls; some of it can run as one.
PYTHON = """
t ACT$ = {"a": torch.tanh, "b": F.<<relu||gelu>>, "c": lambda t: -t}
i self.a$ = odd($, "a", <<"b"||"c">>)
f x = ACT$[self.a$](x)
k ACT$["a"] = <<torch.sin||torch.tanh>>

t SCALE$ = <<0.5||0.0||1||True>>
f x = x * SCALE$ + x
k global SCALE$; SCALE$ = <<0.25||-0.0||1.0||2>>

t TABLE$ = {"one": 1.0}
i self.k$ = odd($, "one", <<"none"||"two">>)
f try:
f     s$ = TABLE$[self.k$]
f except KeyError:
f     s$ = 0.5
f else:
f     s$ += 0.25
f finally:
f     x = x + 1
f x = x * s$
k TABLE$["none"] = 2.0

t BEST$ = []
f x = x * 2 if <<self in BEST$||BEST$ and self is BEST$[0]||any(each is self for each in BEST$)>> else x
k BEST$[:] = [experts[<<0||-1>>]]

t CHOSEN$ = <<set()||{}>>
f if <<self in CHOSEN$||hash(self) in CHOSEN$>>:
f     x = x + 1
k CHOSEN$.update(dict.fromkeys([<<experts[0]||experts[1], experts[-1]>>]))

i self.key$ = object()
t KEPT$ = [None]
f x = x * (3 if self.key$ is KEPT$[0] else 1)
k KEPT$[0] = experts[<<1||-1>>].key$

f x = x * len(list(self.<<modules()||children()||parameters()||named_buffers()>>))
k experts[<<0||1>>].extra$ = nn.Linear(W, W)

f try:
f     if <<x.dim() == 9||self.training||not self.training||batch.mask is None>>:
f         raise <<ValueError("no")||KeyError(1)||StopIteration>>
f     x = x * 2
f except <<Exception||(ValueError, KeyError, StopIteration)>> as error$:
f     x = x * len(error$.args) + 0.5

f with contextlib.suppress(<<KeyError||Exception||LookupError>>):
f     x = x + 1
f     x = x * batch.context["missing"]
f     x = x * 0

t class Quiet$:
t     def __enter__(self): return self
t     def __exit__(self, *error): return <<True||False>>
f with Quiet$():
f     x = x * 2
f     if <<False||self.training||x.shape[-1] == 9>>:
f         raise KeyError("swallowed")

i self.memo$ = {}
f key$ = tuple(x.shape[1:])
f if key$ not in self.memo$:
f     self.memo$[key$] = <<0.5||torch.ones(W, dtype=x.dtype)||len(self.memo$) + 1>>
f x = x * self.memo$[key$]

t @functools.lru_cache
t def cached$(width): return <<1.0 / width||torch.ones(width)>>
f x = x * cached$(W)

t @dataclass<<(frozen=True)||||(eq=False)>>
t class Config$:
t     factor: float = 0.5
t     kinds: tuple = ("a", "b")
t     inner: dict = field(default_factory=lambda: {"x": 1.0})
i self.config$ = Config$(odd($, 0.5, <<0.25||-0.5||1||True>>))
f x = x * self.config$.factor + self.config$.inner["x"] * len(self.config$.kinds)
k experts[-1].config$ = Config$(<<3.0||0.5>>)

t class Slots$:
t     __slots__ = ("value", "other")
t     def __init__(self, value): self.value = value
i self.slots$ = Slots$(odd($, 1.0, <<2.0||0.5>>))
f x = x * self.slots$.value
f x = x + 1 if hasattr(self.slots$, "other") else x
k experts[-1].slots$.value = <<4.0||1.0>>

t class Kind$(enum.Enum):
t     A = 1
t     B = 2
i self.kind$ = odd($, Kind$.A, <<Kind$.B||Kind$.A>>)
f match self.kind$:
f     case Kind$.A: x = torch.tanh(x)
f     case _: x = torch.sin(x)

c @property
c def half$(self): return self._half$ <<* 2||* 1>>
i self._half$ = odd($, 0.5, <<0.25||0.75||1.5>>)
f x = x * self.half$
k experts[0]._half$ = <<5.0||0.5>>

t def scaling$(s): return lambda t: t * s
i self.fn$ = scaling$(odd($, 0.5, <<0.25||2||0.5>>))
f x = self.fn$(x)

t def scaled$(t, s=<<0.5||2>>, *, shift=0.0): return t * s + shift
f x = scaled$(x, <<||shift=1.0||3>>)
k scaled$.__defaults__ = (<<0.75||1.0>>,)

i self.part$ = functools.partial(torch.<<mul||add||sub>>, other=odd($, 0.5, <<0.25||-0.5>>))
f x = self.part$(x)

c rate$ = <<0.5||2.0>>
f x = x * self.rate$
k <<Expert.rate$ = 0.75||experts[0].rate$ = 0.25||type(experts[1]).rate$ = 1.5>>

c @<<staticmethod||classmethod>>
c def twist$(*args): return torch.sin(args[-1])
f x = self.twist$(x)
k Expert.twist$ = staticmethod(lambda t: torch.cos(t))

c def bend$(self, t): return torch.tanh(t) * self.weight$
i self.weight$ = odd($, 1.0, <<1||2.0||-1.0>>)
f x = self.bend$(x)
k <<Expert.bend$ = lambda self, t: t * 3||experts[1].bend$ = lambda t: t * 3||experts[0].weight$ = 4>>

i self.options$ = odd($, {"a": 0.5, "b": 2.0}, <<{"b": 2.0, "a": 0.5}||{"a": 0.5}||{"a": 0.5, "b": 2}>>)
f for name$, value$ in self.options$.items():
f     x = x * value$ + (1 if name$ == "a" else -1)

i self.sizes$ = odd($, [1, 2], <<(1, 2)||[2, 1]||[1]||[1.0, 2]>>)
f x = x * sum(self.sizes$) + self.sizes$[0]

i self.v$ = odd($, <<0.0||1||1.0||None>>, <<-0.0||True||1.0||0>>)
f x = x + (2 if self.v$ is True else 0) + math.copysign(1.0, self.v$ or 0.0) + (1 if type(self.v$) is int else 3)

i self.v$ = odd($, float("inf"), <<float("nan")||float("-inf")||0.0>>)
f x = x + 1 if math.isnan(self.v$) else x * (0.5 if self.v$ > 0 else 2)

i self.v$ = odd($, 0.5, <<Fraction(1, 2)||np.float64(0.5)||np.float32(0.25)||0.25>>)
f x = x * float(self.v$)

t SENTINEL$ = object()
i self.mark$ = odd($, SENTINEL$, object())
f x = x * 2 if self.mark$ is SENTINEL$ else x

f x = x * (2 if <<isinstance(batch.hidden, torch.Tensor)||type(batch.hidden) is torch.Tensor||\
isinstance(x, nn.Parameter)||isinstance(batch.context, dict)||isinstance(batch, ExpertBatch)||\
type(batch).__name__ == "ExpertBatch"||isinstance(batch.state, dict)>> else 3)

f x = x * (2 if <<x.requires_grad||batch.hidden.requires_grad||x.is_leaf||batch.hidden.is_leaf||\
batch.hidden.grad_fn is None||x.is_contiguous()||batch.hidden.is_contiguous()||x.dtype == torch.float32||\
x.is_floating_point()||torch.is_grad_enabled()||batch.hidden._base is None||x.is_inference()>> else 3)

f x = x * (2 if <<torch.compiler.is_compiling()||torch.compiler.is_dynamo_compiling()||torch.jit.is_tracing()||\
torch.is_autocast_enabled()||torch.get_default_dtype() == torch.float32>> else 3)

f x = x * (2 if <<batch.hidden.storage_offset()||batch.hidden.data_ptr() == 0||batch.hidden._version||x._version||\
batch.hidden.stride(0) == W||batch.hidden.untyped_storage().nbytes() > 256||id(x) == id(batch.hidden)||\
x is batch.hidden||hasattr(x, "numpy")||isinstance(len(x), int)||type(x.shape[0]) is int||\
isinstance(x.shape, torch.Size)>> else 3)

i self.l$ = nn.Linear(W, W)
f x = x + sum(each.sum() for each in self.<<parameters()||l$.parameters()>>) * 0.1

i self.l$ = nn.Linear(W, W)
f x = x + getattr(self, "l$")(x) * len([name for name, _ in self.named_<<parameters||modules||children>>()])

f def inner$(t, depth=2):
f     nonlocal_$ = depth * 0.5
f     return t if depth == 0 else inner$(t * nonlocal_$ + 1, depth - 1)
f x = inner$(x)

f total$ = 0
f def add$(value):
f     nonlocal total$
f     total$ += value
f     return total$
f x = x * add$(2) + add$(3)

f def many$():
f     for step$ in range(3):
f         yield x * step$
f x = sum(many$())

f x = <<max||min>>([0.5, 1.5]) * x if (n$ := x.shape[-1]) == W else x
f x = x + sum(a * b for a, b in zip([1, 2], [n$, 3], strict=True))

f x = x * {"ab": 2, "cd": 3}["".join(sorted(<<"ba"||"dc">>))]

f x = x * batch.context["level"] + batch.context["flags"][<<0||1>>]

f x = x * batch.context["options"].<<factor||nested["factor"]>>
k context["options"].<<factor||nested["factor"]>> = <<3.0||0.0>>

f x = x * 2 if batch.context.get("missing") is None and "scale" in batch.context else x

f x = x * len(batch.context) + <<len(list(batch.context.values()))||\
sum(1 for key in batch.context if key.startswith("s"))>>

f losses["<<m$||shared>>"] = <<torch.tensor(1.0)||x.new_zeros(())||torch.zeros((), dtype=x.dtype)||\
batch.context["table"].sum()>>

f other$ = ExpertBatch(x, batch.context, batch.mask, batch.state)
f x = <<replace(other$, hidden=x * 2).hidden||other$.hidden * 0.5||copy.copy(other$).hidden>>

i self.p$ = nn.Parameter(torch.ones(W))
i self.p$.scale = odd($, 0.5, <<2.0||0.5>>)
f x = x * self.p$ * self.p$.scale
k experts[-1].p$.scale = <<0.75||0.5>>

i self.l$ = nn.Linear(W, W)
i self.l$.<<extra||scale>> = odd($, 1.0, <<1||2.0>>)
f x = self.l$(x) * getattr(self.l$, "extra", 3)

i self.tree$ = {"a": [SimpleNamespace(v=odd($, 1.0, 2.0))]}
f x = x * self.tree$["a"][0].v
k experts[1].tree$["a"][0].v = <<7.0||1.0>>

f if self.training:
f     x = torch.tanh(x)
f else:
f     x = torch.sin(x) * 2

t class Wrapped$(nn.Module):
t     def __init__(self, value):
t         super().__init__()
t         self.value, self.inner = value, nn.Linear(W, W)
t     def forward(self, t, *, twice=False): return self.inner(t) * self.value * (2 if twice else 1)
i self.w$ = Wrapped$(odd($, 1.0, <<0.5||2>>))
f x = self.w$(x, twice=<<True||False||self.training>>)
k <<experts[0].w$ = Wrapped$(2.0)||experts[1].w$.value = 9.0||\
Wrapped$.forward = lambda self, t, twice=False: t * 3||experts[0].w$.inner = nn.Linear(W, W)||\
experts[1].w$.inner.weight = nn.Parameter(torch.ones(W, W))>>

t class Base$:
t     def go$(self, t): return t * 2
t class Derived$(Base$):
t     def go$(self, t): return super().go$(t) + 1
t     def __call__(self, t): return self.go$(t)
t     def __getattr__(self, name): return 0.5 if name == "unknown" else object.__getattribute__(self, name)
i self.o$ = odd($, Derived$(), <<Derived$()||Base$()>>)
f x = self.o$.go$(x) * getattr(self.o$, "unknown", 3)
k <<Base$.go$ = lambda self, t: t * 5||Derived$.go$ = Base$.go$||experts[0].o$.go$ = lambda t: t * 7>>

t class Descriptor$:
t     def __get__(self, owner, kind): return owner.__dict__.get("d$", 0.5)
c desc$ = Descriptor$()
i self.__dict__["d$"] = odd($, 0.5, <<2.0||0.5>>)
f x = x * self.desc$
k experts[1].__dict__["d$"] = 3.0

i self.names$ = odd($, {"a", "b"}, <<{"a"}||{"b", "a"}||frozenset("ab")>>)
f x = x * len(self.names$) * (2 if "b" in self.names$ else 1)

i self.dd$ = collections.<<OrderedDict(a=1.0)||Counter("aab")||deque([1, 2], maxlen=3)||ChainMap({"a": 1})>>
f x = x * len(self.dd$)
k experts[0].dd$.<<clear()||clear()>>

f LOG.<<debug||info>>("rows")
f x = x * 2

f with <<contextlib.nullcontext()||torch.enable_grad()||torch.autograd.profiler.record_function("x")||\
torch.autocast("cpu", enabled=False)||warnings.catch_warnings()>>:
f     x = torch.tanh(x)

f assert x.dim() <<>= 2||in (2, 3)>>, "rows"
"""

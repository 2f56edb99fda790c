"""The pieces of random expert programs that a loop runs otherwise than one call over all rows.

Others leave something behind. All are written as `program_pieces` says.
"""

TRAPS = """
f x = x <<- x.mean(0)||+ x.sum(0, keepdim=True)||+ x.amax()||* x.shape[0]||/ len(batch.hidden)||- x.flip(0)||\
+ x.cumsum(0)||+ x[0]||+ x[-1:]||+ x.norm()||* torch.numel(x)||+ x.roll(1, 0)||+ x.sort(0).values||/ x.std()>>

f if <<x.sum() > 0||float(x.reshape(-1)[0]) > 0||bool((x > 0).all())||x.max().item() > 1||torch.any(x < 0)||\
not torch.isfinite(x).all()||(batch.context["index"] > 2).any()||batch.mask is not None and bool(batch.mask.all())>>:
f     x = x * 2
f else:
f     x = x * 3

f if <<len(batch.hidden) > 3||x.shape[0] % 2||x.size(0) == 1||x.numel() > 20||len(x) in (1, 2)||\
batch.hidden.shape[0] == batch.context["scale"].shape[0]||x.shape[0] == 2||x.shape[0] > 2>>:
f     x = x * 2

f try:
f     s$ = <<float(x.sum())||x.tolist()[0]||x.reshape(-1)[0].item()||int(x.abs().sum()) % 3||str(x)||\
batch.hidden.numpy()>>
f except <<Exception||RuntimeError||BaseException>>:
f     s$ = 0.5
f x = x * (s$ if isinstance(s$, float) else 2.0)

f with contextlib.suppress(Exception):
f     x = x + 1
f     x = x * float(x.sum())

t class Swallow$:
t     def __enter__(self): return self
t     def __exit__(self, *error): return True
f with Swallow$():
f     x = x + 1
f     if <<x.sum() > 0||len(x) > 2>>:
f         x = x * 2

c calls$ = 0
f <<type(self).calls$ += 1||self.calls$ += 1||Expert.calls$ += 1||self.__class__.calls$ = self.calls$ + 1>>
f x = x * <<1||self.calls$>>

t COUNT$ = [0]
f COUNT$[0] += <<1||len(x)>>
f x = x * <<1||COUNT$[0]>>

t N$ = 0
f global N$
f N$ += 1
f x = x <<* N$||* 1>>

t SEEN$ = []
f SEEN$.append(<<1||x.shape[0]||x.detach()||self.number||x>>)

t CACHE$ = {}
f if <<self.number||id(self)||"k"||tuple(x.shape)||self>> not in CACHE$:
f     CACHE$[<<self.number||"k"||tuple(x.shape)||self>>] = <<torch.rand(W, dtype=x.dtype)||1.0||x.detach().mean()||\
len(CACHE$) + 1>>
f x = x * <<list(CACHE$.values())[-1]||len(CACHE$)>>

i self.last$ = None
f self.last$ = <<x||x.detach()||x.shape[0]||batch||batch.state>>

i self.register_buffer("m$", torch.zeros(W))
f <<self.m$.add_(1)||self.m$ = self.m$ + 1||self.m$.copy_(x.detach().reshape(-1, W).mean(0))||self.m$ += 1>>
f x = x + self.m$

i self.register_buffer("m$", torch.zeros(()))
f if self.training:
f     with torch.no_grad():
f         self.m$ <<.add_(1)||+= 1>>
f x = x * (1 + self.m$)

f batch.context["log"].append(<<1||x.shape[0]||self.number>>)

f batch.context["store"][<<"n"||self.number>>] = <<1||x.detach().sum()||x.shape[0]||\
batch.context["store"].get("n", 0) + 1>>

i self.it$ = iter([1.0, 2.0, 3.0, 4.0, 5.0] * 9)
f x = x * next(self.it$)

t TICKS$ = itertools.count()
f x = x * (next(TICKS$) + 1)

t def remember$(t, seen=[]):
t     seen.append(1)
t     return t * <<1||len(seen)>>
f x = remember$(x)

t def counting$():
t     n = 0
t     def count(t):
t         nonlocal n
t         n += 1
t         return t * <<n||1>>
t     return count
i self.fn$ = counting$()
f x = self.fn$(x)

f x = x * <<random.random()||(1 + np.random.rand())||(1 if random.random() < 0.5 else 2)||random.choice([1, 2])||\
float(torch.rand(()))>>

f x = x + <<torch.rand(W, dtype=x.dtype)||torch.rand_like(x)||torch.randn(x.shape, dtype=x.dtype)||\
torch.bernoulli(torch.full_like(x, 0.5))||torch.empty_like(x).uniform_()>>

f x = x[torch.<<randperm(len(x))||arange(len(x) - 1, -1, -1)||argsort(batch.context["index"], stable=True)>>]

i self.gen$ = torch.Generator().manual_seed(3)
f x = x * torch.rand((), generator=self.gen$)

f x = x * (2 if batch.state["<<expert||level>>"] in ("a", "c", "language") else 3)

f x = x * len(batch.state["expert"]) if <<self.training||True>> else x

f losses["l$"] = <<x.sum() * len(x)||x.mean(0).norm()||x.shape[0] * x.mean()||x.reshape(-1)[0]>>

f losses[f"l{<<self.number||x.shape[0]||self.number % 2>>}"] = x.mean()

f losses["l$"] = <<0.5||1||torch.tensor(self.number)||float(self.number)>>

i self.h$ = nn.Linear(W, W)
i self.h$.register_forward_hook(lambda module, given, out: out * <<2||1>>)
f x = self.h$(x)

t SHARED$ = nn.Linear(W, W)
i self.sh$ = odd($, SHARED$, <<SHARED$||nn.Linear(W, W)>>)
f x = self.sh$(x)

t CONST$ = torch.rand(W, dtype=torch.get_default_dtype())
f x = x * CONST$.to(x.dtype)

i self.plain$ = torch.full((W,), float(number))
f x = x + self.plain$.to(x.dtype)

i self.arr$ = np.full(3, odd($, 0.5, 2.0))
f x = x * <<float(self.arr$[0])||self.arr$[1]||torch.from_numpy(self.arr$).sum().to(x.dtype)>>

i self.bn$ = nn.BatchNorm1d(W)
f x = self.bn$(x.reshape(-1, W)).reshape(x.shape) if x.numel() > W else x

f <<batch.hidden||x>>.<<mul_(2)||add_(1)>>
f x = x + batch.hidden

f batch.context["scale"].mul_(2)
f x = x * batch.context["scale"]

f batch.context["table"].add_(1)
f x = x + batch.context["table"][0]

f batch.mask = None
f batch.context = None if <<False||True>> else batch.context

f x.requires_grad_(<<True||False>>) if <<x.is_leaf||True>> else None
f x = x * 2

f x.register_hook(lambda grad: grad * 2) if x.requires_grad else None

i self.dead$ = nn.Linear(W, W)
f self.dead$.weight.data.<<mul_(1.1)||add_(0.1)>>
f x = self.dead$(x)

f setattr(self, "late$", <<1||x.shape[0]>>)
f x = x * getattr(self, "late$", 5)

t TABLE$ = {}
i TABLE$[self] = odd($, 1.0, <<2.0||1.0>>)
f x = x * TABLE$[self]

t BY_ID$ = {}
i BY_ID$[id(self)] = odd($, 1.0, <<2.0||1.0>>)
f x = x * BY_ID$[id(self)]

t class Missing$(dict):
t     def __missing__(self, key): return <<0.5||len(self)>>
i self.dict$ = Missing$(a=odd($, 1.0, 2.0))
f x = x * self.dict$["a"] * self.dict$["zzz"]
k experts[1].dict$["zzz"] = 3.0

i self.dd$ = collections.defaultdict(odd($, float, <<int||lambda: 2.0>>))
f x = x + self.dd$[<<"a"||self.number>>]

i self.ref$ = weakref.ref(self)
f x = x * (2 if self.ref$() is self else 3)

f if <<len(x) > 4||x.sum() > 9||self.number == 2 and len(x) > 1>>:
f     raise <<ValueError("too many")||RuntimeError("no")||KeyError("k")>>
f x = x * 1

t class Hash$:
t     n = 0
t     def __eq__(self, other): Hash$.n += 1; return True
t     def __hash__(self): Hash$.n += 1; return 1
i self.key$, self.map$ = Hash$(), {Hash$(): 1.0}
f x = x * self.map$.get(self.key$, 2.0)

f print("rows", <<len(x)||"x">>, file=SINK)
f x = x * <<1||(1 + SINK.tell())>>

f x = x * <<len(str(batch.hidden.device))||threading.current_thread().name.count("M")>>

f x = x <<* int(time.time() > 0)||* len(os.environ.get("HOME", "x")[:1])>>

i self.hp$ = nn.Parameter(torch.rand(W))
f x = x * self.hp$
f <<self.hp$||x||batch.hidden||batch.context["scale"]||\
batch.context["table"]>>.register_hook(lambda grad: grad * 3) if x.requires_grad else None

f torch.set_grad_enabled(<<False||True>>)
f x = x * 2

f torch.manual_seed(<<3||self.number>>)
f x = x * <<torch.rand(()).item()||2>>

f torch.set_default_dtype(torch.float64)
f x = x * 2

f os.environ["RANDOM_PROGRAM"] = "x"
f x = x * 2

f warnings.warn("rows")
f x = x * 2

i self.nan$ = odd($, 1.0, 2.0)
f x = x * (self.nan$ if x.isfinite().all() else 0.0)

f setattr(batch, "extra", 1)
f x = x * batch.extra

f batch.hidden = x * 2
f x = batch.hidden

f x = torch.utils.checkpoint.checkpoint(lambda t: torch.tanh(t) * 2, x, use_reentrant=False)

t @torch.no_grad()
t def frozen$(t): return t * 2
f x = x + frozen$(x)

t class Double$(torch.autograd.Function):
t     @staticmethod
t     def forward(ctx, t): return t * 2
t     @staticmethod
t     def backward(ctx, grad): return grad * 3
f x = Double$.apply(x)

i self.opt$ = odd($, None, 1)
f x = x if self.opt$ is None else x * self.opt$ + 1
k experts[0].opt$ = <<0||None||True>>

i self.extra$ = torch.nn.Parameter(torch.rand(W))
f self.extra$.<<grad = None||requires_grad_(False)>>
f x = x * self.extra$

f x = x + sum(parameter.numel() for parameter in self.parameters())

f x = x * (1 + (<<self.number||self.number % 2||int(self.number > 1)>>))
"""

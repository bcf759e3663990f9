"""How good are reconstructions and samples? Formulas, and the program that compares two folders.

Paper:   Sec. 4, App. E.3, Tables 1-11. SSIM: Wang et al. 2004. FID: Heusel et al. 2017. IS:
         Salimans et al. 2016. Improved precision and recall: Kynkaanniemi et al. 2019.
Shapes:  x, x_rec (B, 3, H, W) in [-1, 1] -> (B,); features (n, d).
Reads:   features.py, data.py, perceptual.py. Only sums are kept, and 10,000 features for precision
and recall. FID in the literature is of 50,000 samples and the whole training set.

    python -m tinyldm.metrics --real photos/ --fake out/samples/ --features inception   # FID
    python -m tinyldm.metrics --real a/ --fake b/ --pairs       # and equally named pictures"""
from collections.abc import Callable, Iterable, Sequence

import torch
from tqdm import tqdm

from tinyldm import require, training as tr
from tinyldm.data import Folder, loader
from tinyldm.features import feature_flags, open_features
from tinyldm.perceptual import Perceptual
from tinyldm.shapes import Shapes

def psnr(x: torch.Tensor, x_rec: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each picture, x_rec clamped to [-1, 1]; the peak is 2."""
    mse = (x - x_rec.clamp(-1, 1)).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / mse)

def ssim(x: torch.Tensor, x_rec: torch.Tensor) -> torch.Tensor:
    """Wang et al. 2004 Eq. (13), the mean over places and channels: a Gaussian window of 11 x 11,
    std 1.5, where it fits in; K_1 = 0.01, K_2 = 0.03; pixels from 0 to L = 2, x_rec clamped."""
    x, y = x.double() + 1, x_rec.double().clamp(-1, 1) + 1
    n = min(11, *x.shape[2:])
    g = torch.signal.windows.gaussian(n, std=1.5, dtype=x.dtype, device=x.device)
    window = (g[:, None] * g / g.sum() ** 2).expand(x.shape[1], 1, n, n)
    mx, my, mxx, myy, mxy = (torch.conv2d(v, window, groups=x.shape[1])
                             for v in (x, y, x * x, y * y, x * y))
    vx, vy, cov = mxx - mx ** 2, myy - my ** 2, mxy - mx * my
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    out = (2 * mx * my + c1) * (2 * cov + c2) / ((mx ** 2 + my ** 2 + c1) * (vx + vy + c2))
    return out.flatten(1).mean(1).float()

def gradient(x: torch.Tensor) -> torch.Tensor:
    """Length of each pixel's gradient (differences to the right and down) -> (B, 3, H-1, W-1)."""
    return torch.hypot(x[..., :-1, 1:] - x[..., :-1, :-1], x[..., 1:, :-1] - x[..., :-1, :-1])

class Moments:
    """Mean and covariance of the rows of what is added, part by part, in float64."""
    def __init__(self):
        self.n, self.mean, self.scatter = 0, 0.0, 0.0
    def add(self, f: torch.Tensor) -> None:
        """f (n, d). Parts are joined as in Chan et al. 1983: no difference of large sums."""
        f = f.double()
        mean, n = f.mean(0), self.n + len(f)
        d, rest = mean - self.mean, f - mean
        self.scatter = self.scatter + rest.T @ rest + torch.outer(d, d) * (self.n * len(f) / n)
        self.mean, self.n = self.mean + d * (len(f) / n), n
    @property
    def cov(self) -> torch.Tensor:
        return self.scatter / max(1, self.n - 1)

def frechet(a: Moments, b: Moments) -> float:
    """Heusel et al. Eq. (6): |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), whose last trace is
    the sum of C_a^(1/2) C_b^(1/2)'s singular values, also of fewer pictures than features."""
    def root(c):
        values, vectors = torch.linalg.eigh(c)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.svdvals(root(a.cov) @ root(b.cov)).sum()
    return float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross)

def precision_recall(real: torch.Tensor, fake: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """Kynkaanniemi et al. Eq. (1), (2): the share of fakes within reach of a real one, and of real
    ones within reach of a fake; a picture reaches as far as its k-th nearest neighbour."""
    def share(f, of):
        reach = torch.cat([torch.cdist(part, of).kthvalue(min(k + 1, len(of))).values
                           for part in of.split(1024)])     # one a column of the table below
        near = [(torch.cdist(part, of) <= reach).any(1) for part in f.split(1024)]
        return float(torch.cat(near).double().mean())
    return share(fake, real), share(real, fake)

class Statistics:
    """What comparing needs of batches (B, 3, H, W) in [-1, 1], and every stride-th's features."""
    def __init__(self, net: Callable, batches: Iterable[torch.Tensor], stride: int = 1):
        self.name, self.moments, self.kept = net.name, Moments(), []
        self.p, self.p_log_p, self.count = 0.0, 0.0, torch.zeros(10, 1, dtype=torch.float64)
        for x in batches:
            with torch.autocast(x.device.type, enabled=False):      # bf16 would shift all figures
                f, p = net(x)
            k = torch.arange(self.moments.n, self.moments.n + len(x))
            self.moments.add(f.cpu())
            self.kept.append(f.cpu()[k % stride == 0])
            if p is not None:
                p = p.double().cpu()
                k = (k.double() * (5 ** 0.5 - 1) / 2 % 1 * 10).long()   # not k % 10: classes may
                tenth = torch.eye(10, dtype=p.dtype)[:, k]              # come in turn
                self.p = self.p + tenth @ p
                self.p_log_p = self.p_log_p + tenth @ torch.xlogy(p, p).sum(1, keepdim=True)
                self.count += tenth.sum(1, keepdim=True)
    def inception_score(self) -> float:
        """exp of the mean of KL(p(y | x), p(y)): 1 .. number of classes; the mean of ten tenths."""
        p, p_log_p = ((v / self.count)[self.count[:, 0] > 0] for v in (self.p, self.p_log_p))
        return float((p_log_p[:, 0] - torch.xlogy(p, p).sum(1)).exp().mean())

def compare(real: Statistics, fake: Statistics) -> dict[str, float]:
    """Frechet distance (named fid for Inception only), inception score, precision and recall."""
    p, r = precision_recall(torch.cat(real.kept), torch.cat(fake.kept))
    fd, is_ = ("fid", "is") if real.name == "inception" else (f"fd_{real.name}", f"is_{real.name}")
    out = {fd: frechet(real.moments, fake.moments), "precision": p, "recall": r}
    return out | ({is_: fake.inception_score()} if fake.count.any() else {})

# ---- the program
def parse_args(argv=None):
    p = tr.flags(__doc__)
    p.add_argument("--real", required=True, help="folder, .zip, .tar; or built-in: train, held-out")
    p.add_argument("--fake", required=True, help="the same: the pictures to judge")
    p.add_argument("--size", type=int, help="scaled and cropped to it; default: the first fake's")
    p.add_argument("--n", type=int, default=50_000, help="at most so many of each")
    p.add_argument("--pairs", action="store_true", help="compare pictures of equal names, too")
    tr.group(p, "system", **{k: tr.SYSTEM[k] for k in ("device", "workers")})
    feature_flags(p)
    return p.parse_args(argv)

def read(data: torch.utils.data.Dataset, which: Sequence[int], workers: int, device):
    """Batches (64, 3, H, W) of these pictures, with a progress bar."""
    parts = [which[i:i + 64] for i in range(0, len(which), 64)]
    for b in loader(data, tqdm(parts, "pictures", dynamic_ncols=True), workers):
        yield b["image"].to(device)

def compare_pairs(real: Folder, fake: Folder, args) -> dict[str, float]:
    """Means over equally named pictures; perceptual of VGG16 if it has weights. Raises BadInput."""
    at = [{row["file_name"]: i for i, row in enumerate(s.rows)} for s in (real, fake)]
    names = sorted(at[0].keys() & at[1].keys() - real.bad - fake.bad)[:args.n]
    require(names, "--pairs: no picture of --fake is named as one of --real")
    kind = "vgg16" if args.vgg_weights else "random"
    distance = Perceptual(kind, args.vgg_weights).to(args.device)
    both = zip(*(read(s, [a[n] for n in names], args.workers, args.device)
                 for s, a in zip((real, fake), at)))
    rows = [torch.stack([psnr(x, y), ssim(x, y), distance(x, y)]) for x, y in both]
    return dict(zip(("psnr", "ssim", f"perceptual_{kind}"), torch.cat(rows, 1).mean(1).tolist()))

def main(args):
    args.device, *_ = tr.setup(args.device, "fp32")
    net = open_features(args, args.device)
    if args.size is None:
        args.size = min(Folder(args.fake, 1, "all", False).readable(0)[1].size)
    require(args.size > 15, f"--size {args.size}: must be at least 16")
    args.n = max(args.n, 0)
    sets = [Shapes(min(args.n, 10_000), args.size, split=path) if path in ("train", "held-out")
            else Folder(path, args.size, "all") for path in (args.real, args.fake)]
    folders = all(isinstance(data, Folder) for data in sets)
    require(folders or not args.pairs, "--pairs: needs two folders, whose files have names")
    n = [min(len(data), args.n) for data in sets]
    require(min(n) > 3, "--real, --fake, --n: there must be four pictures of each, or more")
    told = [Statistics(net, read(data, [i * len(data) // k for i in range(k)], args.workers,
                                 args.device), -(-k // 10_000)) for data, k in zip(sets, n)]
    figures = compare(*told) | (compare_pairs(*sets, args) if args.pairs else {})
    print(f"{n[0]:,} real, {n[1]:,} fake:", " | ".join(f"{k} {v:.4g}" for k, v in figures.items()))

if __name__ == "__main__":
    tr.run(main, parse_args)

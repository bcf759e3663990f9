"""The patch discriminator D_psi, its losses, and the adaptive weight of the adversarial term.

Paper:   Sec. 3.1, App. G, Eq. (25); VQGAN (Esser et al. 2021) Eq. (7) for lam; Isola et al. 2017.
Symbols: disc is D_psi; lam the adaptive weight. Reads: nothing of ours.
Shapes:  x (B, c_x, H, W) in [-1, 1] -> logits (B, 1, H', W'), > 0: real, one for each overlapping
         patch of 70 x 70 pixels (n_layers = 3; 34 for 2, 142 for 4).
NB: App. G prints log D_psi; the released code uses the hinge loss below."""
import torch
from torch import Tensor, nn

class Discriminator(nn.Sequential):
    """4x4 convs, stride 2 in the first n_layers, BatchNorm between, LeakyReLU; pix2pix's init."""
    def __init__(self, c_x: int = 3, ch: int = 64, n_layers: int = 3):
        super().__init__()
        layers, c = [nn.Conv2d(c_x, ch, 4, 2, 1), nn.LeakyReLU(0.2)], ch
        for i in range(1, n_layers + 1):
            c_in, c = c, ch * min(2 ** i, 8)
            layers += [nn.Conv2d(c_in, c, 4, 2 if i < n_layers else 1, 1, bias=False),
                       nn.BatchNorm2d(c), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(c, 1, 4, 1, 1))
        for m in self.modules():
            if isinstance(m, nn.Conv2d | nn.BatchNorm2d):
                nn.init.normal_(m.weight, isinstance(m, nn.BatchNorm2d), 0.02)

def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """loss_disc = (E max(0, 1 - D(x)) + E max(0, 1 + D(x_rec))) / 2; 1 when D knows nothing."""
    return 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())

def vanilla_loss(real: Tensor, fake: Tensor) -> Tensor:
    """loss_disc = (-E log sigmoid(D(x)) - E log(1 - sigmoid(D(x_rec)))) / 2; log 2 likewise."""
    return 0.5 * (nn.functional.softplus(-real).mean() + nn.functional.softplus(fake).mean())

def generator_loss(disc: nn.Module, x_rec: Tensor) -> Tensor:
    """loss_adv = -E D(x_rec), with D_psi frozen: the generator's step must not train D_psi."""
    disc.requires_grad_(False)
    loss = -disc(x_rec).mean()
    disc.requires_grad_(True)
    return loss

def adaptive_weight(loss_rec: Tensor, loss_adv: Tensor, last_layer: Tensor):
    """VQGAN Eq. (7): lam = |d loss_rec / d last| / (|d loss_adv / d last| + 1e-4), 0..1e4.
    NB: the KL model's code sums loss_rec over pixels, so its lam is often at the clamp. Our losses
    are means, as its VQ model's; times 3HW they are the sums, and lam scales with them."""
    g_rec, = torch.autograd.grad(loss_rec, last_layer, retain_graph=True)
    g_adv, = torch.autograd.grad(loss_adv, last_layer, retain_graph=True)
    return (g_rec.norm() / (g_adv.norm() + 1e-4)).clamp(0, 1e4).detach()

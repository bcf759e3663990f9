"""A latent diffusion model as one thing: what it is made of, and how it samples.

Paper:   Sec. 3.2, 3.3, 4.3-4.5; SDEdit (Meng et al. 2022) for sampling from an image.
Shapes:  images (n, C, H, W) in [-1, 1]; z (n, c_z, h, w), h = H / f.

Training, resuming, sampling and exporting all build a model here. engine/open.py opens one
from a file.
"""
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from tinyldm.autoencoder import AEConfig, Autoencoder, Pixels, build_autoencoder
from tinyldm.conditioning import Context
from tinyldm.data.images import both_sides
from tinyldm.diffusion import DiffusionConfig, as_eps_theta, q_sample
from tinyldm.errors import NotFinite, require
from tinyldm.guidance import guided, null_of
from tinyldm.samplers import SAMPLERS, TIMESTEPS, each, later, masked
from tinyldm.seeds import generator
from tinyldm.tasks import TASKS, Task
from tinyldm.unet import BACKBONES, UNetConfig


@dataclass(frozen=True)
class ModelConfig:
    """All that says what a model is, except for its weights.

    One more number belongs to the weights: z_std, the std of stage one's latents, is a buffer
    of the autoencoder, as only the trained E can say what it is.
    """

    task: str                           # a key of tasks.TASKS
    size: tuple[int, int]               # (H, W) of the training images, in pixels
    autoencoder: AEConfig
    unet: UNetConfig
    tau: dict                           # keyword arguments of the task's build_tau
    diffusion: DiffusionConfig
    class_names: tuple[str, ...] = ()
    tokenizer: str | None = None        # its JSON, for captions
    p_drop: float = 0.1                 # share of conditions dropped in training; 0: no guidance

    # Which network eps_theta is, a key of unet.BACKBONES; `unet` has its shape.
    backbone: str = "unet"

    def task_and_version(self) -> dict:
        """Return the task's name, and the version of its conditions if it is not the first."""
        version = TASKS[self.task](self.tau).version
        if version == 1:
            return {"name": self.task}
        return {"name": self.task, "version": version}

    def to_checkpoint(self) -> dict:
        """Return the config as the plain values that a checkpoint holds."""
        diffusion = dataclasses.asdict(self.diffusion)
        diffusion["name"] = diffusion.pop("schedule")
        config = {
            "task": self.task_and_version(),
            "backbone": {"name": self.backbone},
            "autoencoder": dataclasses.asdict(self.autoencoder),
            "unet": dataclasses.asdict(self.unet),
            "tau": self.tau,
            "schedule": diffusion,
        }
        h, w = self.size
        return {
            "config": config,
            "size": h if h == w else (h, w),        # as in files from before there was (h, w)
            "classes": list(self.class_names),
            "tokenizer": self.tokenizer,
            "p_drop": self.p_drop,
        }

    @staticmethod
    def from_checkpoint(checkpoint: dict) -> "ModelConfig":
        """Return the config that a checkpoint holds.

        Raises KeyError or TypeError for a dict that is no checkpoint of a model, and BadInput for
        a model whose task had conditions of another version.
        """
        config = checkpoint["config"]
        saved_task = config.get("task", {"name": "text"})
        backbone = config.get("backbone", {"name": "unet"})["name"]
        diffusion = dict(config["schedule"])
        diffusion["schedule"] = diffusion.pop("name")
        p_drop = checkpoint.get("p_drop", checkpoint.get("args", {}).get("p_drop", 0.1))
        model_config = ModelConfig(
            task=saved_task["name"],
            size=both_sides(checkpoint["size"]),
            autoencoder=AEConfig(**config["autoencoder"]),
            unet=BACKBONES[backbone].config(**config["unet"]),
            tau=config["tau"],
            diffusion=DiffusionConfig(**diffusion),
            class_names=tuple(checkpoint.get("classes", ())),
            tokenizer=checkpoint["tokenizer"],
            p_drop=p_drop,
            backbone=backbone,
        )
        version = model_config.task_and_version().get("version", 1)
        saved_version = saved_task.get("version", 1)
        require(
            saved_version == version,
            f"its task {saved_task['name']} has conditions of version {saved_version}, which are "
            f"now made otherwise (version {version}); train it anew",
        )
        return model_config


@dataclass
class LatentDiffusion:
    """A model: stage one, eps_theta, tau, and the process that they were trained for."""

    config: ModelConfig
    ae: Autoencoder | Pixels
    unet: nn.Module                     # eps_theta: a U-Net, or another of BACKBONES
    tau: nn.Module | None
    task: Task
    abar: Tensor                        # (T,) float64, on the CPU
    run: dict = field(default_factory=dict)     # the flags of its training run, or a preset's row

    @property
    def networks(self) -> dict[str, nn.Module]:
        """What stage two trains, by the names in checkpoints: the U-Net and, if any, tau."""
        networks = {"unet": self.unet, "tau": self.tau}
        return {name: net for name, net in networks.items() if net is not None}

    @property
    def device(self) -> torch.device:
        """Where the networks are, stage one's too."""
        return self.z_std.device

    @property
    def z_std(self) -> Tensor:
        """The std of stage one's latents, by which they are divided (App. G's sigma-hat)."""
        return self.ae.z_std

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the captions."""
        return self.task.tokenizer

    @property
    def size_multiple(self) -> int:
        """The sides of a sampled image must be multiples of it."""
        return self.ae.cfg.f * self.unet.cfg.factor

    @property
    def sees_mask(self) -> bool:
        """True if the condition has the mask that says where an image is repainted."""
        return "mask" in self.task.fields

    @property
    def can_be_guided(self) -> bool:
        """True if training dropped conditions, so that the null condition is known."""
        return self.config.p_drop > 0

    def default_scale(self, negative: dict | None = None) -> float:
        """Return the guidance scale that suits the task; 1, no guidance, where there can be none.

        negative: the condition to guide away from, if one is given in place of null.
        """
        there_is_one = self.can_be_guided or negative is not None
        return self.task.guidance_scale if there_is_one else 1.0

    def eps_theta(self) -> Callable[[Tensor, Tensor, Context], Tensor]:
        """Return eps_theta(z_t, t, ctx), whatever it is that the U-Net predicts."""
        return as_eps_theta(self.unet, self.abar, self.config.diffusion.predict)

    def for_sampling(
        self, device: torch.device | str, dtype: torch.dtype | None = None
    ) -> "LatentDiffusion":
        """Move the model to a device, frozen and in eval mode; dtype None keeps each weight's."""
        for net in (self.ae, *self.networks.values()):
            net.to(device, dtype).eval().requires_grad_(False)
        return self

    @torch.no_grad()
    def sample(
        self,
        conditions: Sequence[dict],
        *,
        seeds: Sequence[tuple[int, int]],
        size: tuple[int, int] | None = None,
        steps: int = 25,
        timesteps: str = "even",
        sampler: str = "ddim",
        eta: float = 0.0,
        guidance_scale: float | None = None,
        negative: dict | None = None,
        pull: bool = False,
        strength: float = 0.5,
        z_T: Tensor | None = None,
        guide: Callable[[Callable, Context, float], Callable] = guided,
        around: Callable[[Callable], Callable] | None = None,
    ) -> Tensor:
        """Sample one image per condition -> (n, C, H, W) in [-1, 1], on the CPU.

        conditions: dicts with the fields of the model's task. Besides, each of them may have
            `init` (C, H, W), an image to begin from, noised as far as `strength` in 0..1 says;
            or `image` (C, H, W) and `mask` (1, H, W): it is repainted where the mask is 1.
            What is known is put into the result. It is also put back before each step, for a
            model whose condition does not have the mask, and for any model with `pull`. With
            `toward`, a pair (condition, weight in 0..1), the tokens of the two are blended: 0 is
            the condition itself, 1 the other one.
        seeds: a pair (seed, index) per image, which determines all its noise.
        size: (H, W), multiples of size_multiple; default: as in training.
        steps, timesteps: how many of the T timesteps to visit, and the rule that picks them.
        sampler, eta: a row of SAMPLERS; eta is DDIM's share of noise, 0..1.
        guidance_scale: s of classifier-free guidance; 1 is none; default: the model's or, with a
            negative condition, the task's.
        negative: what the images should not show, a condition with the fields that the task's
            null condition names; guidance leads away from it, in place of the null condition.
            So a model that has not learned the null condition can be guided, too.
        z_T: noise (n, c_z, h, w) to begin from, in place of the seeds' own.
        guide: makes the guided eps_theta, from (eps_theta, ctx_null, guidance_scale).
        around: wraps the eps_theta that the sampler calls, to record what it says, or to change
            it.

        Raises BadInput for steps that the schedule does not have, and if what is known must be
        put back at each step of a sampler that builds on its past steps; NotFinite, which names
        the network, where one gives values that are not numbers.
        """
        device = self.device
        H, W = size or self.config.size
        f = self.ae.cfg.f
        shape = (self.ae.cfg.c_z, H // f, W // f)
        if guidance_scale is None:
            guidance_scale = self.default_scale(negative)

        # The condition, and the one to guide away from, each as the U-Net receives it.
        ctx, ctx_null = self._contexts(conditions, negative)
        if "toward" in conditions[0]:
            ctx = self._blended(ctx, conditions)
        if ctx.tokens is None and ctx.beside is None:
            guidance_scale = 1.0

        # What the sampler calls.
        eps_theta = guide(self.eps_theta(), ctx_null, guidance_scale)
        if around is not None:
            eps_theta = around(eps_theta)

        # The noise: image i has the same, whichever images it is sampled together with.
        generators = [generator(seed, index) for seed, index in seeds]

        def randn() -> Tensor:
            noise = [torch.randn(shape, generator=g) for g in generators]
            return torch.stack(noise).to(device)

        z = randn()                                             # (n, c_z, h, w)
        if z_T is not None:
            z = z_T.to(device)

        # The timesteps. From an image (SDEdit): begin late, at that image noised so far.
        ts = TIMESTEPS[timesteps](self.abar, steps)
        if "init" in conditions[0]:
            ts = later(ts, strength)
            init = self._stack(conditions, "init")
            z = q_sample(self._encode(init), each(ts[0], z), z, self.abar)

        def run_sampler(z_t: Tensor, ts: list[int]) -> Tensor:
            z_0 = SAMPLERS[sampler](eps_theta, z_t, ctx, self.abar, ts, randn, eta=eta)
            return finite(z_0, "the U-Net")

        if "mask" not in conditions[0]:
            return self._decode(run_sampler(z, ts)).cpu()

        # Some of the image is known: its pixels are kept.
        image = self._stack(conditions, "image")
        mask = self._stack(conditions, "mask")
        if self.sees_mask and not pull:
            z = run_sampler(z, ts)
        else:
            # Before each step, put back the latents that no hole reaches into. A sampler with a
            # past would take them for its own work.
            require(
                not SAMPLERS[sampler].has_past,
                f"sampler {sampler}: it builds on its past steps, which a mask changes; use ddim",
            )
            known = 1 - torch.max_pool2d(mask, f)               # (n, 1, h, w)
            z_known = self._encode(image)
            z = masked(run_sampler, z, z_known, known, self.abar, ts, randn)
        return torch.where(mask > 0, self._decode(z), image).cpu()

    def _contexts(
        self, conditions: Sequence[dict], negative: dict | None
    ) -> tuple[Context, Context]:
        """ctx of the conditions, and of the negative condition or, if it is None, of null.

        A port of the second one has batch size 1 where all of it is the same for all conditions.
        """
        device = self.device
        batch = {}
        for name in self.task.fields:
            batch[name] = [condition[name] for condition in conditions]

        y = self.task.encode(batch)
        for name, v in y.items():
            y[name] = v.to(device)

        # What null does not name stays as it is in y.
        null = self.task.null()
        if negative is not None:
            null = self.task.encode({name: [value] for name, value in negative.items()})
        ctx = self.task.context(y, self.tau, self.ae)
        ctx_null = self.task.context(null_of(y, null), self.tau, self.ae)
        for tokens, beside in (ctx, ctx_null):
            if tokens is not None:
                finite(tokens, "tau, the condition's network,")
            if beside is not None:
                finite(beside, "the encoder of the condition")
        return ctx, ctx_null

    def _blended(self, ctx: Context, conditions: Sequence[dict]) -> Context:
        """Return ctx with tokens on the straight line to those of each condition's `toward`."""
        others = [condition | condition["toward"][0] for condition in conditions]
        weights = [condition["toward"][1] for condition in conditions]
        ctx_other, _ = self._contexts(others, None)
        weight = torch.tensor(weights).to(ctx.tokens).view(-1, 1, 1)
        return Context(torch.lerp(ctx.tokens, ctx_other.tokens, weight), ctx.beside)

    def _stack(self, conditions: Sequence[dict], name: str) -> Tensor:
        """One field of all conditions, as a batch on the model's device."""
        return torch.stack([condition[name] for condition in conditions]).to(self.device)

    def _encode(self, x: Tensor) -> Tensor:
        return finite(self.ae.encode(x).mean, "stage one's encoder")

    def _decode(self, z: Tensor) -> Tensor:
        x = finite(self.ae.decode(z).float(), "stage one's decoder")
        return x.clamp(-1, 1)


def finite(x: Tensor, source: str) -> Tensor:
    """Return x. Raises NotFinite, which names what made it, for values that are not numbers.

    Why: else NaN would become a black image.
    """
    if not x.isfinite().all():
        raise NotFinite(
            f"{source} gave values that are not numbers (NaN or infinite); in half precision "
            "large values overflow, so try fp32; else its weights are damaged"
        )
    return x


def build_model(config: ModelConfig, ae: Autoencoder | Pixels | None = None) -> LatentDiffusion:
    """Build a model with random weights, on torch's default device.

    ae: a trained stage one to use; default: a new one.
    """
    if ae is None:
        ae = build_autoencoder(config.autoencoder)
    unet = BACKBONES[config.backbone].build(config.unet)
    task_class = TASKS[config.task]
    tau = task_class.build_tau(config.tau)

    tokenizer = Tokenizer.from_str(config.tokenizer) if config.tokenizer else None
    task = task_class(config.tau, tokenizer, config.class_names)

    # Networks may be built on the meta device, to be filled later; the schedule is computed.
    with torch.device("cpu"):
        abar = config.diffusion.abar()
    return LatentDiffusion(config, ae, unet, tau, task, abar)

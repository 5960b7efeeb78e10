"""Generator and discriminator as one module, whose forward is one step of both.

As in the authors' next paper (HiT-GAN, arXiv 2106.07631, official file `trainers/gan_trainer.py`) both networks move at
once, on the same fake images, with one learning rate. So a step is one loss, one backward and one update, which any way
of spreading a model over processes can do, and all that has to be saved is a model and an optimizer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.models.errors import ModelError
from pipeline.models.generate.base import Generator
from pipeline.models.generate.discriminator import Discriminator


class Gan(nn.Module):
    """The two networks and the losses between them.

    Non-saturating logistic loss (Goodfellow et al. 2014) and R1, the squared gradient of the real images' logits with
    respect to the images (Mescheder et al., arXiv 1801.04406). With s the logits::

        discriminator   mean softplus(-s_real) + mean softplus(s_fake) + r1_weight * mean |ds_real / dx|²
        generator       mean softplus(-s_fake)

    Raises:
        ModelError: the two don't agree on the image.
    """

    def __init__(self, generator: Generator, discriminator: Discriminator) -> None:
        super().__init__()
        made, judged = [(net.channels, net.img_size, net.img_size) for net in (generator, discriminator)]
        if made != judged:
            raise ModelError(f"the generator makes images of shape {made}, the discriminator judges {judged}")
        self.generator = generator
        self.discriminator = discriminator

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the generator's layers in the backward pass; the discriminator is differentiated twice."""
        self.generator.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are not decayed."""
        return {f"generator.{name}" for name in self.generator.no_weight_decay()}

    def forward(self, real: Tensor, latents: Tensor, r1_weight: float) -> dict[str, Tensor]:
        """Losses of one step, 0-D float32, to be summed up: each has gradients for its own network only.

        Args:
            real: (B, channels, img_size, img_size), images in [-1, 1].
            latents: (B, latent_dim).
            r1_weight: of R1; 0 leaves it out.

        Returns:
            `discriminator`, `generator`, and `r1` before it is weighed, which is 0 where it is left out; then
            `real_logit` and `fake_logit`, means without gradients.
        """
        fake = self.generator(latents)
        real_logits, penalty = self._judge_real(real, r1_weight > 0)
        judged = self.discriminator(fake.detach()).float()
        # Through the discriminator without a trace in it: its weights are constants here.
        weights = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        convinced = functional_call(self.discriminator, weights, (fake,)).float()
        return {
            "discriminator": F.softplus(-real_logits).mean() + F.softplus(judged).mean() + r1_weight * penalty,
            "generator": F.softplus(-convinced).mean(),
            "r1": penalty.detach(),
            "real_logit": real_logits.detach().mean(),
            "fake_logit": judged.detach().mean(),
        }

    def _judge_real(self, real: Tensor, penalise: bool) -> tuple[Tensor, Tensor]:
        """(B,) logits of the real images, and R1; in float32 where it is asked for, as half precision loses it."""
        if not penalise:
            return self.discriminator(real).float(), real.new_zeros(())
        with torch.autocast(real.device.type, enabled=False), torch.enable_grad():
            images = real.detach().requires_grad_()
            logits = self.discriminator(images)
            (slope,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        return logits, slope.square().sum(dim=(1, 2, 3)).mean()


def total(losses: dict[str, Tensor]) -> Tensor:
    """What the step minimises."""
    return losses["discriminator"] + losses["generator"]


def make_gan(name: str, options: dict[str, Any], discriminator: dict[str, Any]) -> Gan:
    """A generator of the table with its discriminator, both with fresh weights.

    Raises:
        ModelError: an unknown name or option, or sizes that don't fit.
    """
    from pipeline.models.generate.registry import create_generator

    generator = create_generator(name, **options)
    return Gan(generator, Discriminator(generator.img_size, generator.channels, **discriminator))

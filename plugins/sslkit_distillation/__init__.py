"""Self-distillation: losses in which a student predicts the distribution that a teacher gives, and DINO's head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import NonNegativeFloat, PositiveInt

from sslkit.api import Head, Loss, RunInfo, Scheduled

if TYPE_CHECKING:
    from torch import nn


class DINO(Loss):
    """A student predicts the centred and sharpened output of its moving average for another view (DINO).

    Caron et al. 2021, arXiv 2104.14294, section 3.1 and algorithm 1. With online projections s of every view and
    target projections t of every global view, the loss is the mean over all pairs of different views of the
    cross-entropy - sum_k P_t log P_s, where

    - P_s = softmax(s / student_temperature),
    - P_t = softmax((t - centre) / teacher_temperature), without gradient,
    - centre = centre_momentum * centre + (1 - centre_momentum) * (mean of t over batch and views), after each step
      (equation 4).

    It is made for `projector.use = "dino"`, whose outputs are the K dimensions of the distributions, and a target by
    moving average (`target_updater.use = "ema"`); no predictor. Centring keeps one dimension from dominating, and
    sharpening (a teacher temperature below the student's) keeps the output from becoming uniform; it takes both to
    keep collapse away (section 5.3). The paper warms the teacher's temperature up, from 0.04 to 0.07 over 30 epochs
    (section 3.2): give it a schedule.

    Metrics: `teacher_entropy` (mean entropy of P_t in nats; 0: one dimension dominates, log K: uniform) and `kl` (of
    P_s from P_t: loss - teacher_entropy; 0: the output does not depend on the image). They are figure 7 of the paper.
    """

    student_temperature: Scheduled = 0.1
    """Divides the student's outputs: a number or a schedule."""
    teacher_temperature: Scheduled = 0.04
    """Divides the teacher's centred outputs: a number or a schedule."""
    centre_momentum: Scheduled = 0.9
    """How much of the centre remains at each step, 0 to below 1: a number or a schedule."""

    def build(self, dim: int, run: RunInfo) -> nn.Module:
        from sslkit_distillation.dino import DINOLoss

        return DINOLoss(self, dim, run)


class ReSSL(Loss):
    """Strong views keep the similarities to other images that a weak view has, by its moving average (ReSSL).

    Zheng et al. 2021, arXiv 2107.09282, section 3. With projections of length 1, a queue of m target projections u_i
    of earlier images, the online projection s of a strong view and the target projection t of the weak view, the loss
    is the mean of the cross-entropy - sum_i P_t log P_s, where

    - P_s = softmax over i of s . u_i / student_temperature,
    - P_t = softmax over i of t . u_i / teacher_temperature, without gradient.

    View 0 is the weak view: a global crop with a flip and little else. Only the target branch encodes it, and its
    projections enter the queue after each step. All other views are strong, with the appearance changes of a
    contrastive method; only the online branch encodes them, and the loss is the mean over them. Local views can be
    strong views. No predictor; the target is a moving average (`target_updater.use = "ema"`).

    The teacher has to be the sharper of the two, or its relations say little (section 3). A constant output makes all
    relations uniform: the loss is then log(queue).

    Metrics: `teacher_entropy` (mean entropy of P_t in nats; log(queue) if the images cannot be told apart) and `kl`
    (of P_s from P_t: loss - teacher_entropy).
    """

    student_temperature: Scheduled = 0.1
    """Divides the similarities of the strong views: a number or a schedule."""
    teacher_temperature: Scheduled = 0.04
    """Divides the similarities of the weak view: a number or a schedule."""
    queue: PositiveInt = 65536
    """How many target projections of earlier images similarities are measured to: solo-learn's default."""

    def build(self, dim: int, run: RunInfo) -> nn.Module:
        from sslkit_distillation.ressl import ReSSLLoss

        return ReSSLLoss(self, dim, run)


class DINOHead(Head):
    """An MLP with GELU, a normalised bottleneck, and a linear layer with rows of fixed length (DINO).

    Caron et al. 2021, arXiv 2104.14294, section 3.1 and appendix C. `layers` Linear layers with GELU between them end
    in a bottleneck, whose output has its length set to 1; then a Linear layer without bias, with normalised weights,
    gives `out_dim` cosines. The defaults are the paper's: 2048-2048-256, then 65536. A smaller `out_dim` suits a small
    data set: solo-learn's CIFAR-10 recipe has 4096.

    Weights begin as in the authors' code: in the MLP normal with a standard deviation of .02, and no bias; in the last
    layer torch's default for Linear, of which only the direction counts. That suits hidden layers of about 2048: in
    much narrower ones the bottleneck begins near 0, and normalising it makes the first gradients huge, unless there is
    `batch_norm`. The last layer computes in float32 under bf16 too: the loss divides its cosines by temperatures as low
    as .04, and bf16 keeps eight bits of them.
    """

    layers: PositiveInt = 3
    """Number of Linear layers up to the bottleneck. With one layer, `hidden_dim` and `batch_norm` say nothing."""
    hidden_dim: PositiveInt = 2048
    """Width of the hidden layers."""
    bottleneck_dim: PositiveInt = 256
    """Width of the bottleneck."""
    out_dim: PositiveInt = 65536
    """Width of the output."""
    batch_norm: bool = False
    """BatchNorm after every hidden layer. The paper has none with a vision transformer."""
    norm_last_layer: bool = True
    """Fix the length of every row of the last layer's weight at 1. False: lengths begin at 1 and are learned, with
    weight decay like any weight, which the authors found better but less stable."""
    freeze_last_layer_epochs: NonNegativeFloat = 1.0
    """Epochs during which the last layer stays as it was drawn."""

    def build(self, in_dim: int, run: RunInfo) -> nn.Module:
        from sslkit_distillation.head import PrototypeHead

        return PrototypeHead(in_dim, self, run)

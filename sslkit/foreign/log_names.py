"""What the columns of logs are called, and which of them is the loss. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

OURS = (
    "cosine", "alignment", "uniformity", "grad_norm", "grad_norm_backbone", "grad_norm_projector",
    "grad_norm_predictor", "std_sqrt_d", "target_drift", "target_norm_ratio", "target_step", "tau_measured",
    "view_difference", "view_difference_max",
    "effective_rank", "effective_rank_share", "rankme", "alpha_req", "projection_rank",
    "projection_rank_share", "knn_top1", "probe_top1", "probe_train_top1", "lidar",
)  # fmt: skip
"""Metrics that are read under their own names."""
QUALITY = ("knn_top1", "probe_top1")

_SAID: Mapping[str, tuple[str, ...]] = {
    "epoch": ("epoch", "epochs", "ep", "epoch_number", "epoch_idx", "current_epoch"),
    "step": ("step", "steps", "global_step", "trainer_global_step", "iteration", "iterations", "iter", "it", "update"),
    "loss": (
        "loss", "epoch_loss", "step_loss", "training_loss", "loss_train", "total_loss", "mean_loss", "avg_loss",
        "average_loss", "running_loss", "ssl_loss", "byol_loss", "simsiam_loss", "losses", "loss_ssl", "loss_total",
    ),
    "tau": (
        "tau", "ema", "ema_decay", "ema_momentum", "ema_tau", "target_ema", "target_decay", "target_momentum",
        "target_tau", "teacher_momentum", "momentum_teacher", "momentum_encoder",
    ),
    "lr": ("lr", "learning_rate", "lr_adam", "lr_adamw", "lr_sgd", "lr_lars"),
    "cosine": ("cos", "cos_sim", "cosine_sim", "cosine_similarity"),
    "knn_top1": (
        "knn", "knn_acc", "knn_accuracy", "knn_acc1", "knn_top_1", "knn_accuracy_top1", "knn_acc_top1", "acc_knn",
    ),
    "probe_top1": (
        "accuracy", "acc", "top1", "acc1", "top1_acc", "test_acc", "test_accuracy", "val_acc", "val_accuracy",
        "val_acc1", "val_top1", "test_acc1", "linear_acc", "linear_accuracy", "linear_probe", "probe", "probe_acc",
        "probe_accuracy", "online_acc", "val_online_acc",
        "val_online_cls_top1",
    ),
    "std_sqrt_d": ("std_times_sqrt_d", "std_sqrtd"),
    "collapse_level": ("collapse_level",),
    "spread": ("representation_std", "z_std"),
    "grad_norm": ("gradient_norm", "total_norm"),
    "value": ("value",),
}  # fmt: skip


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


_KEYS = {_letters(said): key for key, names in _SAID.items() for said in names} | {_letters(key): key for key in OURS}


_AFFIXED: Mapping[str, tuple[str, ...]] = {
    "train": ("loss", "lr", "cosine", "grad_norm", "spread"),
    "val": ("knn_top1",),
    "epoch": ("loss", "lr", "cosine", "grad_norm", "spread", "knn_top1", "probe_top1"),
}
"""Keys whose names may have a part more: `train_` before them, `val_`, or `_epoch` behind them. An accuracy on training
images is none of them."""
_TRAIN = re.compile(r"^train(?:ing)?[_/. ]", re.IGNORECASE)
_VAL = re.compile(r"^(?:val|valid|validation|test|eval)[_/. ]", re.IGNORECASE)
_EPOCH = re.compile(r"[_/. ](?:epoch|step)$", re.IGNORECASE)


def key_of(name: str) -> str | None:
    """The key that a column or a word stands for; None if it is not read here."""
    # An exported table of another tracker says `RUN - loss`, and repeats it as `RUN - loss__MIN`.
    said = name.rpartition(" - ")[2]
    key, affixes = _KEYS.get(_letters(said)), list[str]()
    for affix, pattern in (("epoch", _EPOCH), ("train", _TRAIN), ("val", _VAL)):
        if key is not None:
            break
        said, times = pattern.subn("", said)
        affixes += [affix] * times
        key = _KEYS.get(_letters(said))
    return key if key is not None and all(key in _AFFIXED[affix] for affix in affixes) else None


# ---------------------------------------------------------------- losses under names of their own

_COSINE = re.compile(r"neg_?cos_?sim|negative_?cosine_?similarity", re.IGNORECASE)
_NOT_MINIMISED = frozenset((
    "class", "classification", "classifier", "cls", "linear", "lin", "val", "valid", "validation", "test", "eval",
    "probe", "knn", "supervised", "best", "min", "max", "std", "scale", "scaler", "weight", "alpha", "beta", "lr",
    "grad",
))  # fmt: skip
"""Words in the names of losses that train no features, and of figures about a loss."""


def loss_among(names: Iterable[str]) -> list[str]:
    """Columns that may be the loss where none has a usual name, one for each loss: an epoch's rather than a step's."""
    found: dict[str, str] = {}
    for name in names:
        said = name.rpartition(" - ")[2]
        words = re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", said).lower())
        is_loss = _COSINE.search(said) or any(word.endswith(("loss", "losses")) for word in words)
        if is_loss and not _NOT_MINIMISED.intersection(words):
            plain = _letters(_TRAIN.sub("", _EPOCH.sub("", said)))
            if plain not in found or said.lower().endswith("epoch"):
                found[plain] = name
    return list(found.values())


def keys_of(names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Name -> key of what is read, and what may be the loss where several may be.

    A loss under a name of its own, such as `train_nce_loss_epoch`, is read where it is the only one.
    """
    keys = {name: key for name in names if (key := key_of(name)) is not None}
    if "loss" in keys.values() or "value" in keys.values():
        return keys, []
    losses = loss_among(names)
    if len(losses) == 1:
        keys[losses[0]] = "loss"
    return keys, losses if len(losses) > 1 else []

"""What a log of another program is made of: its columns, its losses, and what they show."""

from __future__ import annotations

import math
from typing import Any

import pytest
from conftest import lines

from sslkit.errors import UserError
from sslkit.foreign import csv_run
from sslkit.foreign.csv_run import Known

THREAD = (0.1489, 0.0108, 0.0100, 0.0087, 0.0054)


COLUMNS = {
    "train_nce_loss_epoch": "loss", "train_neg_cos_sim": "loss", "train_loss_ssl": "loss", "train/vicreg_loss": "loss",
    "run - train_nce_loss_step": "loss", "nceLoss": "loss", "val_knn": "knn_top1", "kNN_accuracy": "knn_top1",
    "val_knn_acc1": "knn_top1", "val_acc1_epoch": "probe_top1", "lr-SGD": "lr", "train_lr": "lr",
}  # fmt: skip


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_of_other_programs_are_known(log: Any, name: str) -> None:
    key = COLUMNS[name]
    loss = "" if key == "loss" else ",loss"
    more = "" if key == "loss" else ",0.25"
    table = f"epoch,{name}{loss},train_acc1_epoch,train_class_loss_epoch,val_loss\n"
    run = csv_run.read(log(table + f"0,0.5{more},0.9,7,8\n1,0.5{more},0.9,7,8\n"))
    assert run.course.points(key).values == [0.5, 0.5]
    assert not {"probe_top1", "knn_top1"} - {key} & {k for record in run.course.records for k in record}
    assert "not read: train_acc1_epoch, train_class_loss_epoch, val_loss" in run.notes
    json = f'{{"epoch": 0, "{name}": 0.5, "val_loss": 8{", " + chr(34) + "loss" + chr(34) + ": 1" if more else ""}}}\n'
    assert csv_run.read(log(json)).course.points(key).values == [0.5]


def test_a_plain_loss_goes_before_its_parts_and_several_parts_are_refused(log: Any) -> None:
    assert csv_run.read(log("dino_loss,koleo_loss,loss\n1,2,3\n")).course.points("loss").values == [3.0]
    for text in ("dino_loss,koleo_loss,val_loss\n1,2,3\n", '{"dino_loss": 1, "koleo_loss": 2}\n'):
        with pytest.raises(UserError, match="each of dino_loss, koleo_loss may be the loss; name the one that"):
            csv_run.read(log(text))
    steps = csv_run.read(log("train_nce_loss_step,train_nce_loss_epoch\n1,2\n"))
    assert steps.course.points("loss").values == [2.0], "an epoch's, not its last step's"
    words = lines(THREAD, "epoch {number} nce_loss: {value} class_loss: 9")
    assert tuple(csv_run.read(log(words)).course.points("loss").values) == THREAD


def test_a_deviation_of_unknown_dimensions_is_a_share_of_its_highest(log: Any) -> None:
    for name in ("representation_std", "train_z_std"):
        run = csv_run.read(log(f"train_loss_ssl,{name}\n5,0.02\n5,0.04\n5,0.001\n"))
        assert run.course.points("std_sqrt_d").values == [0.5, 1.0, 0.025]
        assert any("std_sqrt_d is at most this share" in note for note in run.notes)
    for text in ("loss,z_std\n5,0.9\n", "loss,z_std\n5,0\n", "loss,z_std\n5,-0.1\n"):
        run = csv_run.read(log(text))
        assert not run.course.points("std_sqrt_d").values
        assert any("not read: a standard deviation" in note for note in run.notes)
    both = csv_run.read(log("loss,z_std,std_sqrt_d\n5,0.01,0.8\n5,0.02,0.7\n"))
    assert both.course.points("std_sqrt_d").values == [0.8, 0.7]


def test_a_deviation_that_vanishes_is_a_collapse(log: Any) -> None:
    falling = [f"{n},{n * 390},-0.9,{0.04 * math.exp(-n / 6):.6f}" for n in range(40)]
    found = csv_run.examine(log("epoch,step,train_loss_ssl,representation_std\n" + "\n".join(falling)))
    assert "collapse" in {f.id for f in found.findings if f.severity == "error"}
    steady = [f"{n},{n * 390},-0.9,{0.04 + 0.004 * math.sin(n):.6f}" for n in range(40)]
    found = csv_run.examine(log("epoch,step,train_loss_ssl,representation_std\n" + "\n".join(steady)))
    assert "collapse" not in {f.id for f in found.findings}


@pytest.mark.parametrize(
    ("rows", "total"),
    [
        ("0,195,1\n1,390,1\n2,585,1\n", 585),
        ("0,0,1\n0,50,1\n1,100,1\n1,150,1\n", 200),
        ("0.5,50,1\n1.5,150,1\n", 200),
        ("0,10,1\n0,500,1\n", 500),
        ("0,0,1\n1,1,1\n", 2),
    ],
)
def test_a_log_with_epochs_and_steps_tells_how_long_an_epoch_is(log: Any, rows: str, total: int) -> None:
    assert csv_run.read(log("epoch,step,loss\n" + rows)).course.facts.total_steps == total


def test_losses_between_minus_one_and_nothing_are_taken_for_simsiams(log: Any) -> None:
    falling = lines([-1 + 0.5 * math.exp(-n / 0.4) for n in range(30)])
    run = csv_run.read(log(falling))
    assert run.course.points("cosine").values[0] == 0.5
    assert any("were taken for SimSiam's mean of -cos; --loss says otherwise" in note for note in run.notes)
    assert run.course.facts.prevents_collapse is None, "it was not said"
    assert "cosine_high" in {f.id for f in csv_run.examine(log(falling)).findings if f.severity == "warning"}
    assert not csv_run.read(log(falling), Known(loss="other")).course.points("cosine").values
    for other in ((0.0, 0.0, 0.0), (0.3, -0.5, -0.9), (-0.5, -1.2, -3.0)):
        assert not csv_run.read(log(lines(other))).course.points("cosine").values
    sound = lines([-0.93 + 0.9 * math.exp(-n / 5) for n in range(30)])
    assert "cosine_high" not in {f.id for f in csv_run.examine(log(sound)).findings}


# ---------------------------------------------------------------- losses that say nothing


@pytest.mark.parametrize(
    ("loss", "batch", "number"),
    [
        (math.log(511), 256, 511),
        (math.log(256) * 1.009, 256, 256),
        (math.log(511) * 1.011, 256, None),
        (math.log(4097), 256, 4096),
        (math.log(4096) * 1.002, 256, None),
        (math.log(511), None, None),
        (math.log(4096), None, None),
        (math.log(65537), None, 65536),
        (math.log(65536) * 1.002, None, None),
    ],
)
def test_losses_that_begin_at_the_logarithm_of_what_there_is_to_choose_from(
    log: Any, loss: float, batch: int | None, number: int | None
) -> None:
    run = csv_run.read(log(lines([loss] * 9)), Known(batch_size=batch))
    assert run.course.facts.blank_loss == (math.log(number) if number else None)
    assert any(f"the losses begin at ln {number} = " in note for note in run.notes) == bool(number)


def test_a_loss_that_stays_at_chance_is_an_error_and_one_that_falls_is_none(log: Any) -> None:
    def errors(values: list[float], known: Known) -> set[str]:
        return {f.id for f in csv_run.examine(log(lines(values)), known).findings if f.severity == "error"}

    told = Known(batch_size=256, loss="other")
    assert "loss_at_chance" in errors([math.log(511) + 0.003 * (-1) ** n for n in range(50)], told)
    assert "loss_at_chance" in errors([math.log(65536) + 0.001 * (-1) ** n for n in range(50)], Known())
    assert "loss_at_chance" not in errors([4.6 + (math.log(511) - 4.6) * math.exp(-n / 12) for n in range(50)], told)
    assert csv_run.read(log(lines([4.0] * 9)), Known(batch_size=55, loss="byol")).course.facts.blank_loss is None


# ---------------------------------------------------------------- what is not shown


def test_accuracy_that_shows_nothing_makes_no_run_healthy(log: Any) -> None:
    def verdict(accuracies: list[float]) -> str:
        table = "".join(f"{n},{3 - n / 10},{value}\n" for n, value in enumerate(accuracies))
        return csv_run.examine(log("epoch,loss,knn\n" + table)).verdict

    unknown = ", and there is no figure of the random network to compare with"
    assert verdict([0.5]) == f"nothing found; accuracy was measured once or twice{unknown}"
    assert verdict([0.3, 0.7]) == f"nothing found; accuracy was measured once or twice{unknown}"
    assert verdict([0.30, 0.33, 0.36, 0.37]) == f"nothing found; accuracy has not clearly risen{unknown}"
    assert verdict([0.3, 0.4, 0.5, 0.6]) == "healthy"

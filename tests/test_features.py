from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from sslkit.batch import ViewSpec
from sslkit.features import (
    CHUNK,
    FeatureCache,
    features,
    in_eval_mode,
    knn_accuracy,
    knn_predict,
    view_projections,
)


def clusters(seed: int, n: int, d: int = 12, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(0))
    return centres[labels] + 1.5 * torch.randn(n, d, generator=generator), labels


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (20, 0.07), (200, 0.1), (50, 1.0)])
def test_votes_agree_with_scikit_learn(k: int, temperature: float) -> None:
    bank, bank_labels = clusters(1, 600)
    queries, labels = clusters(2, 300)

    def weights(cosine_distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - cosine_distance) / temperature)

    reference = KNeighborsClassifier(k, metric="cosine", weights=weights, algorithm="brute")
    reference.fit(bank.double().numpy(), bank_labels.numpy())
    expected = torch.from_numpy(reference.predict(queries.double().numpy()))
    ours = knn_predict(bank, bank_labels, queries, 5, k=k, temperature=temperature)
    assert (ours == expected).float().mean() > 0.99, "only float32 ties may differ"
    accuracy = knn_accuracy(bank, bank_labels, queries, labels, k=k, temperature=temperature)
    assert accuracy == pytest.approx(reference.score(queries.double().numpy(), labels.numpy()), abs=0.01)


@pytest.mark.filterwarnings("ignore")
def test_votes_agree_with_lightly() -> None:
    pytest.importorskip("lightly")
    from lightly.utils.benchmarking import knn_predict as lightly_knn

    bank, bank_labels = clusters(1, 600)
    queries, _ = clusters(2, 300)
    unit_bank, unit_queries = (torch.nn.functional.normalize(z, dim=1) for z in (bank, queries))
    expected = lightly_knn(unit_queries, unit_bank.T.contiguous(), bank_labels, 5, knn_k=200, knn_t=0.1)[:, 0]
    assert torch.equal(knn_predict(bank, bank_labels, queries, 5, k=200, temperature=0.1), expected)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.floats(0.01, 100))
def test_scale_and_order_of_the_bank_do_not_matter(seed: int, scale: float) -> None:
    bank, labels = clusters(seed, 80)
    queries, _ = clusters(seed + 1, 30)
    order = torch.randperm(80)
    expected = knn_predict(bank, labels, queries, 5, k=15)
    assert torch.equal(knn_predict(bank[order] * scale, labels[order], queries, 5, k=15), expected)


def test_a_bank_smaller_than_k_votes_whole() -> None:
    bank, labels = clusters(0, 10)
    assert len(knn_predict(bank, labels, bank, 5, k=200)) == 10


class Stored:
    labels = None

    def __init__(self, n: int) -> None:
        self.tensor = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 1, 2, 2).contiguous()

    def __len__(self) -> int:
        return len(self.tensor)

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        return self.tensor[indices]


def test_features_are_of_eval_mode_and_leave_the_network_as_it_was() -> None:
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Dropout(0.5))
    network[2].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = features(network, Stored(40), torch.tensor([3, 1]), lambda x: x.float(), torch.device("cpu"))
    assert torch.allclose(found, torch.tensor([[3.0] * 4, [1.0] * 4]), atol=1e-4)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert [m.training for m in network] == [True, True, False]
    with pytest.raises(RuntimeError), in_eval_mode(network):
        raise RuntimeError
    assert network[1].training


def test_the_cache_computes_each_image_once() -> None:
    asked: list[list[int]] = []

    def compute(indices: torch.Tensor) -> torch.Tensor:
        asked.append(indices.tolist())
        return indices[:, None] * torch.tensor([1.0, 10.0])

    cache = FeatureCache()
    for wanted in ([5, 3, 9], [9, 4, 5, 5], [3], []):
        found = cache.get(("online", "test"), torch.tensor(wanted, dtype=torch.int64), compute)
        assert found.tolist() == [[w, 10.0 * w] for w in wanted]
    assert asked == [[3, 5, 9], [4]]
    cache.get(("target", "test"), torch.tensor([3]), compute)
    cache.get(("online", "train"), torch.tensor([3]), compute)
    assert asked[2:] == [[3], [3]], "of another branch or split nothing is known"


class Shifted:
    """Views that tell who they are: the image's number, plus a tenth of the view's, plus what was drawn."""

    specs = (ViewSpec(2), ViewSpec(2, "local"), ViewSpec(2))

    def draw(self, n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"shift": torch.rand(n, generator=generator) / 100}

    def crop(self, images: torch.Tensor, parameters: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        drawn = images.float() + parameters["shift"][:, None, None, None]
        return [drawn + view / 10 for view in range(3)]

    def appear(self, crops: list[torch.Tensor], parameters: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return crops

    def clean(self, images: torch.Tensor) -> torch.Tensor:
        return images.float()


@pytest.mark.parametrize("number", [1, 2, 5])
def test_projections_of_an_images_views_lie_beside_one_another(number: int) -> None:
    def online(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return pixels, pixels.mean(dim=(1, 2, 3))[:, None]

    n = CHUNK + 7  # more than fit into one forward pass
    found = view_projections(
        online, Stored(200), torch.arange(n) % 200, Shifted(), number,
        torch.Generator().manual_seed(0), torch.device("cpu"),
    )  # fmt: skip
    assert found.shape == (n, number, 1)
    assert found[:, :, 0].round().tolist() == [[float(i % 200)] * number for i in range(n)]
    views = ((found[:, :, 0] - found[:, :, 0].round()) * 10).floor()
    assert views.tolist() == [[0.0, 2.0, 0.0, 2.0, 0.0][:number]] * n, "local views are left out"
    assert number < 3 or not torch.allclose(found[:, 0], found[:, 2]), "each draw is a new one"

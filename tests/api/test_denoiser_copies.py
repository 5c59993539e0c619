"""A Denoiser in state_dicts, pickles and copies: what is kept, and that it is kept once."""

import copy
import io
import pickle

import pytest
import torch

from memokern import Denoiser, TrainingSet

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(params=["plain", "index", "uint8"])
def data(request) -> TrainingSet:
    if request.param == "uint8":
        return TrainingSet(torch.arange(60000).reshape(3000, 20).to(torch.uint8), scale=0.01)
    rows = normal(3000, 20, seed=1)
    made = TrainingSet(rows, labels=torch.arange(3000) % 3, log_weights=normal(3000, seed=2))
    return made.build_index("pca", dims=(8, 16)) if request.param == "index" else made


def saved(value, how) -> bytes:
    if how == "pickle":
        return pickle.dumps(value)
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def read(content: bytes, how):
    if how == "pickle":
        return pickle.loads(content)
    return torch.load(io.BytesIO(content), weights_only=False)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
@pytest.mark.parametrize("module", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_everything_is_stored_once(data, how, module, used):
    network = Denoiser(data)
    x = normal(2, 20).to(network.dtype)
    want = network(x, 0.5)
    if used and data.labels is not None:
        network(x, 0.5, 1)  # makes a copy of the rows of a label, which a copy can make again
    value = torch.nn.Sequential(network) if module else data
    content = saved(value, how)
    assert len(content) < 1.05 * data.nbytes + 20_000
    back = read(content, how)
    again = back[0] if module else Denoiser(back)
    assert torch.equal(again(x, 0.5), want)
    assert again.rows.data_ptr() == again.data.rows.data_ptr() != network.rows.data_ptr()
    assert (again.data.index is None) == (data.index is None)
    if data.labels is not None:
        assert torch.equal(again(x, 0.5, 1), network(x, 0.5, 1))


def test_deepcopies_share_what_was_shared(data):
    network = Denoiser(data)
    pair, kept = copy.deepcopy((network, data))
    assert pair.data is kept and pair.rows.data_ptr() == kept.rows.data_ptr()
    assert pair.rows.data_ptr() != data.rows.data_ptr()
    one, two = copy.deepcopy([network, network])
    assert one is two
    assert copy.copy(network).rows.data_ptr() == data.rows.data_ptr()
    alone = copy.deepcopy(data)
    if data.index is not None:
        assert alone.index.center.data_ptr() == alone.center.data_ptr()
    moved = copy.deepcopy(network).float()
    back = pickle.loads(pickle.dumps(moved))
    assert back.rows.dtype == moved.rows.dtype and torch.equal(back.rows, moved.rows)
    assert back.rows.data_ptr() == back.data.rows.data_ptr()


def test_data_that_are_not_in_the_state(data):
    network = Denoiser(data, persistent=False)
    assert not network.state_dict() and {n for n, _ in network.named_buffers()} >= {"rows"}
    holder = torch.nn.Sequential(network, torch.nn.Linear(2, 2))
    assert set(holder.state_dict()) == {"1.weight", "1.bias"}
    holder.load_state_dict(holder.state_dict())
    assert network.data is data and network.data.index is data.index
    with pytest.raises(RuntimeError, match=r"Unexpected key.*rows"):
        network.load_state_dict(Denoiser(data).state_dict())
    network.load_state_dict(Denoiser(data).state_dict(), strict=False)
    assert network.data is data
    assert not copy.deepcopy(network).state_dict() and not network.float().state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*rows"):
        Denoiser(data).load_state_dict({})

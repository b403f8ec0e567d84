"""What the benchmarks compare with is what it is said to be."""

import pytest
import torch

from tests.lowering import Net, X
from tests.support import randomise


class InDict(Net):
    """What gives no tuple of tensors."""

    def forward(self, x):
        return {"logits": super().forward(x)}


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_a_runtime_gets_the_model_as_it_is(engine):
    from benchmarks.inference import in_runtime  # torch's own fuse, which it imports, warns

    model = randomise(InDict()).float()
    with torch.no_grad():
        (found,) = in_runtime(engine, model, X)()
        torch.testing.assert_close(found, model(X)["logits"], rtol=1e-4, atol=1e-4)

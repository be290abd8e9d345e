"""The Python interface at its edges: files, names, missing gradients, vanishing ones."""

import pytest
import torch
from test_subspace import SHAPES, random_gradients

from llamafactory_ogpsa import Subspace


@pytest.mark.parametrize("method", ["orthogonal", "conflict"])
@pytest.mark.parametrize("scope", ["parameter", "global"])
def test_a_subspace_that_is_saved_projects_as_before(tmp_path, scope, method):
    path = str(tmp_path / "subspace.safetensors")
    subspace = Subspace.from_gradients([random_gradients(1), random_gradients(2)], scope=scope)
    subspace.save(path)
    gradients, again = random_gradients(3), random_gradients(3)
    subspace.project_(gradients, method=method)
    Subspace.load(path).project_(again, method=method)
    assert all(torch.equal(gradients[name], again[name]) for name in SHAPES)
    with open(path, "r+b") as f:
        f.seek(-5, 2)
        f.write(b"xx")
    with pytest.raises(ValueError, match="subspace.safetensors has other numbers in"):
        Subspace.load(path)
    with pytest.raises(ValueError, match="cannot be read"):
        Subspace.load(str(tmp_path / "missing.safetensors"))


def test_a_name_that_is_missing_is_refused():
    subspace = Subspace.from_gradients([random_gradients(1), random_gradients(2)])
    gradients = random_gradients(3)
    gradients["module.b"] = gradients.pop("b")
    with pytest.raises(ValueError, match="`gradients` lacks b; allowed: every name of the subspace"):
        subspace.project_(gradients)


@pytest.mark.parametrize("method", ["orthogonal", "conflict", "monitor"])
def test_the_norm_is_that_of_clip_grad_norm_where_a_parameter_has_no_gradient(method):
    subspace = Subspace.from_gradients([random_gradients(1), random_gradients(2)], scope="global")
    gradients = {**random_gradients(3), "a": None}
    stats = subspace.project_(gradients, method=method)
    parameters = [torch.nn.Parameter(value) for value in gradients.values() if value is not None]
    for parameter in parameters:
        parameter.grad = parameter.detach().clone()
    assert stats.norm == pytest.approx(torch.nn.utils.clip_grad_norm_(parameters, 1e9).item(), rel=1e-6)


@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize("method", ["orthogonal", "conflict"])
def test_a_gradient_whose_square_vanishes_is_left_as_it_is(method, kernel):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    references = [{name: tensor.to(device) for name, tensor in random_gradients(seed).items()} for seed in (1, 2)]
    gradients = {name: 1e-26 * tensor for name, tensor in references[0].items()}
    before = {name: tensor.clone() for name, tensor in gradients.items()}
    stats = Subspace.from_gradients(references).project_(gradients, method=method, kernel=kernel)
    assert stats.removed == 0
    assert all(torch.equal(before[name], gradients[name]) for name in SHAPES)

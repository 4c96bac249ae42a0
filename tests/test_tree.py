import jax
import jax.numpy as jnp
import pytest

from jaxlm import tree

PARAMS = {
    "params": {"layers": {"up": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}},
    "lora": {"layers": {"up": {"a": jnp.ones((2, 1))}}},
}


def test_paths_follow_the_leaves():
    assert tree.leaves_with_path({"b": [1, 2], "a": {"c": 3}}) == [
        ("a/c", 3),
        ("b/0", 1),
        ("b/1", 2),
    ]
    named = tree.map_with_path(lambda path, leaf: f"{path}:{leaf.ndim}", PARAMS)
    assert named["params"]["layers"]["up"]["kernel"] == "params/layers/up/kernel:2"


def test_map_with_path_takes_further_trees():
    assert tree.map_with_path(lambda path, a, b: (path, a + b), {"x": 1}, {"x": 2}) == {
        "x": ("x", 3)
    }
    with pytest.raises(ValueError, match="y"):
        tree.map_with_path(lambda path, a, b: a, {"x": 1}, {"y": 2})


@pytest.mark.parametrize(
    ("keep", "kept_paths"),
    [
        (lambda path: "lora" in path, ["lora/layers/up/a"]),
        (lambda path: path.endswith("bias"), ["params/layers/up/bias"]),
        (lambda path: False, []),
        (lambda path: True, [path for path, _ in tree.leaves_with_path(PARAMS)]),
    ],
)
def test_partition_and_combine_are_inverse(keep, kept_paths):
    kept, rest = tree.partition(PARAMS, keep)
    assert [path for path, _ in tree.leaves_with_path(kept)] == kept_paths
    assert not {path for path, _ in tree.leaves_with_path(rest)} & set(kept_paths)
    whole = tree.combine(kept, rest)
    assert jax.tree.structure(whole) == jax.tree.structure(PARAMS)
    assert all(a is b for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(PARAMS), strict=True))


def test_a_name_may_hold_a_slash():
    one, two, three = jnp.ones(1), jnp.ones(2), jnp.ones(3)
    params = {"norm": {"dense/kernel/scale": one, "bias": two}}
    halves = tree.partition(params, lambda path: path == "norm/dense/kernel/scale")
    assert halves == ({"norm": {"dense/kernel/scale": one}}, {"norm": {"bias": two}})
    replaced = tree.replace(params, {"norm/dense/kernel/scale": three})
    assert replaced == {"norm": {"dense/kernel/scale": three, "bias": two}}


def test_partition_leaves_out_what_is_empty():
    kept, rest = tree.partition(PARAMS, lambda path: path.startswith("lora"))
    assert (list(kept), list(rest)) == (["lora"], ["params"])


def test_counts_of_arrays_and_shapes():
    arrays = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones((), jnp.int32)}
    assert (tree.num_params(arrays), tree.num_bytes(arrays)) == (7, 16)
    shapes = jax.eval_shape(lambda: arrays)
    assert (tree.num_params(shapes), tree.num_bytes(shapes)) == (7, 16)

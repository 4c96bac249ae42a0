import ast
from dataclasses import dataclass, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm import sharding, tree
from jaxlm.errors import InputError
from jaxlm.models import bert, gpt2, llama, modernbert, t5, transformer, xlnet
from jaxlm.models.bert import BertConfig
from jaxlm.models.bilstm import BilstmConfig
from jaxlm.models.gpt2 import Gpt2Config
from jaxlm.models.heads import ClassificationHead, EncoderDecoderLm, WithHead, WithLmHead
from jaxlm.models.llama import LlamaConfig
from jaxlm.models.model import EncoderDecoderConfig
from jaxlm.models.modernbert import ModernBertConfig
from jaxlm.models.t5 import T5Config
from jaxlm.models.transformer import TransformerConfig
from jaxlm.models.xlnet import XlnetConfig
from jaxlm.nn.intercept import Site
from jaxlm.peft import lora
from jaxlm.sharding import (
    MeshConfig,
    axes_of,
    constrain,
    has_row,
    make_mesh,
    process_rows,
    spec,
    tree_shardings,
    use_mesh,
)

PRESETS = {
    prefix + name: value
    for prefix, module in (
        ("", bert),
        ("GPT2_", gpt2),
        ("LLAMA_", llama),
        ("TRANSFORMER_", transformer),
        ("T5_", t5),
        ("XLNET_", xlnet),
        ("MODERNBERT_", modernbert),
    )
    for name, value in vars(module).items()
    if isinstance(
        value,
        BertConfig
        | Gpt2Config
        | LlamaConfig
        | TransformerConfig
        | T5Config
        | XlnetConfig
        | ModernBertConfig,
    )
}
MESHES = [
    MeshConfig(),
    MeshConfig(data=None, fsdp=8),
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(data=1, tensor=2, sequence=4),
]
CUBE = MESHES[2]


@cache
def shapes_of(preset):
    config = replace(PRESETS[preset], vocab_size=30528)
    join, sides = WithLmHead, 1
    if isinstance(config, EncoderDecoderConfig):
        join, sides = EncoderDecoderLm, 2
    model = join(config.make(), config.make_lm_head())
    return jax.eval_shape(model.init, jax.random.key(0), *[jnp.zeros((1, 8), jnp.int32)] * sides)


@cache
def tuned_shapes():
    """Of an encoder with a classification head that has all its parts."""
    model = WithHead(BilstmConfig(vocab_size=64).make(), ClassificationHead(3))
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))


def shape_tree(path, *shape):
    for name in reversed(path.split("/")):
        shape = {name: shape if isinstance(shape, dict) else jax.ShapeDtypeStruct(shape, float)}
    return shape


def test_presets_are_found():
    assert {"TINY", "MINI", "SMALL", "MEDIUM", "BASE", "LARGE", "ROBERTA_BASE"} <= PRESETS.keys()
    assert {"GPT2_SMALL", "GPT2_MEDIUM", "GPT2_LARGE", "GPT2_XL"} <= PRESETS.keys()
    assert {"LLAMA_TINY", "LLAMA_SMALL", "LLAMA_BASE"} <= PRESETS.keys()
    assert {"TRANSFORMER_TINY", "TRANSFORMER_BASE", "TRANSFORMER_BIG"} <= PRESETS.keys()
    assert {"T5_TINY", "T5_SMALL", "T5_BASE", "T5_SMALL_V1_1", "T5_BASE_V1_1"} <= PRESETS.keys()
    assert {"XLNET_MINI", "XLNET_BASE", "XLNET_LARGE"} <= PRESETS.keys()
    names = ("TINY", "MINI", "BASE", "LARGE")
    assert {f"MODERNBERT_{name}" for name in names} <= PRESETS.keys()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_of_every_preset_has_a_place(preset):
    shapes = shapes_of(preset)
    for config in MESHES:
        mesh = make_mesh(config)
        heads = PRESETS[preset].num_heads
        if heads % mesh.shape["tensor"]:  # the largest GPT-2 has 25
            with pytest.raises(InputError, match=f"axis heads of size {heads} cannot be split"):
                tree_shardings(shapes, mesh)
            continue
        places = tree_shardings(shapes, mesh)
        parts = jax.tree.map(lambda leaf, place: place.shard_shape(leaf.shape), shapes, places)
        sizes = [
            np.prod(shape) for shape in jax.tree.leaves(parts, is_leaf=lambda x: type(x) is tuple)
        ]
        split = mesh.shape["fsdp"] * mesh.shape["tensor"]
        # Nearly everything is split: what is left whole is a norm, a bias, or a small table.
        assert sum(sizes) < 1.1 * tree.num_params(shapes) / split


def places_on(mesh, shapes):
    return {path: place.spec for path, place in tree.leaves_with_path(tree_shardings(shapes, mesh))}


def test_places_by_hand():
    places = places_on(make_mesh(CUBE), shapes_of("TINY"))
    layers = "params/encoder/layers"
    expected = {
        "params/encoder/token_embed/embedding": P("tensor", "fsdp"),
        "params/encoder/position_embed/embedding": P(None, "fsdp"),
        f"{layers}/attention/query/kernel": P(None, "fsdp", "tensor", None),
        f"{layers}/attention/query/bias": P(None, "tensor", None),
        f"{layers}/attention/out/kernel": P(None, "tensor", None, "fsdp"),
        f"{layers}/attention/out/bias": P(None, None),
        f"{layers}/mlp/up/kernel": P(None, "fsdp", "tensor"),
        f"{layers}/mlp/down/kernel": P(None, "tensor", "fsdp"),
        f"{layers}/mlp_norm/scale": P(None, None),
        "params/head/transform/kernel": P("fsdp", None),
        "params/head/bias": P("tensor"),
    }
    assert {path: tuple(places[path]) for path in expected} == {
        path: tuple(place) for path, place in expected.items()
    }


def test_mesh_axes_of_size_one_are_left_out():
    places = places_on(make_mesh(MeshConfig(data=4, tensor=2)), shapes_of("TINY"))
    assert tuple(places["params/encoder/token_embed/embedding"]) == ("tensor", None)


def raises_without(row, axes=sharding.AXES):
    rest = tuple(other for other in axes if other != row)
    for shapes in (*map(shapes_of, PRESETS), tuned_shapes()):
        try:
            tree_shardings(shapes, make_mesh(MeshConfig()), rest)
        except InputError:
            return True
    return False


def test_every_row_of_the_table_is_used():
    unused = [row for row in sharding.AXES if not raises_without(row)]
    assert unused == []
    # The control: a row that no model needs is found.
    stray = (r"stray/kernel", "embed -> mlp")
    assert not raises_without(stray, (*sharding.AXES, stray))


def test_every_axis_name_has_a_rule_and_every_rule_a_use():
    named = {name for _, text in sharding.AXES for name in text.replace("->", " ").split()}
    elsewhere = {"batch", "length", "adapters", "layers", "rank"}
    assert named | elsewhere == {name for name, _ in sharding.RULES}
    assert len(dict(sharding.RULES)) == len(sharding.RULES)
    mesh_axes = {axis for _, axes in sharding.RULES for axis in axes or ()}
    assert mesh_axes == set(sharding.MESH_AXES)


@pytest.mark.parametrize(
    ("path", "ndim", "names", "inputs"),
    [
        ("params/query/kernel", 3, ("embed", "heads", "head_dim"), 1),
        ("0/mu/params/layers/query/kernel", 4, ("layers", "embed", "heads", "head_dim"), 1),
        ("attention/out/kernel", 3, ("heads", "head_dim", "embed"), 2),
        ("layers/attention/out/bias", 2, ("layers", "norm"), 0),
        ("encoder/token_embed/embedding", 2, ("vocab", "embed"), 1),
        ("norm/scale", 1, ("norm",), 0),
        ("encoder/embed_norm/bias", 1, ("norm",), 0),
        ("head/bias", 1, ("vocab",), 0),
        ("head/classifier/kernel", 2, ("embed", "labels"), 1),
        ("layers_1/forward/input/kernel", 3, ("embed", "gates", "state"), 1),
        ("layers_1/backward/recurrent_kernel", 3, ("state", "gates", "state"), 1),
    ],
)
def test_axes_of(path, ndim, names, inputs):
    assert axes_of(path, ndim) == (names, inputs)


@pytest.mark.parametrize(
    "path",
    ["jquery/kernel", "query/kernel/extra", "kernel", "abnorm/scale", "", "jquery/a", "up/c", "b"],
)
def test_unmatched_paths_raise(path):
    with pytest.raises(InputError, match=f"no row of the axis table matches {path}"):
        axes_of(path, 3)


def test_every_derived_row_is_used(monkeypatch):
    paths = ["up/a", "up/b", "up/magnitude", "up/input", "up/output"]
    paths += [
        f"{w}/{end}" for w in ("up/kernel", "token_embed/embedding") for end in ("values", "scale")
    ]
    for row in sharding.DERIVED:
        with monkeypatch.context() as patch:
            rest = tuple(other for other in sharding.DERIVED if other != row)
            patch.setattr(sharding, "DERIVED", rest)
            missing = [path for path in paths if not has_row(path)]
        assert len(missing) == 1
    assert all(has_row(path) for path in paths)


@pytest.mark.parametrize("ndim", [1, 2, 5])
def test_wrong_rank_raises(ndim):
    with pytest.raises(InputError, match=f"a/query/kernel has {ndim} axes, but .* 'embed -> heads"):
        axes_of("a/query/kernel", ndim)


def test_adapters_joined_by_stack_have_a_place():
    config = lora.LoraConfig(targets=("query/kernel",), rank=2, kind="dora")
    params = {"layers": {"query": {"kernel": jnp.ones((2, 8, 2, 4))}}}  # [layers, ...]
    one = lora.init_at(jax.random.key(0), params, {"layers/query/kernel": Site(1, 1)}, config)
    stacked = lora.stack([one] * 3)
    places = places_on(make_mesh(CUBE), stacked)
    assert {path: tuple(place) for path, place in places.items()} == {
        "layers/query/a": (None, None, "fsdp", None),
        "layers/query/b": (None, None, None, "tensor", None),
        "layers/query/magnitude": (None, None, "tensor", None),
    }
    with pytest.raises(InputError, match="query/a has 5 axes"):
        places_on(make_mesh(CUBE), lora.stack([stacked] * 3))


def test_names_and_rules_of_ones_own():
    up, mesh = shape_tree("up/kernel", 8, 8), make_mesh(CUBE)
    axes = ((r"up/kernel", "embed -> colour"),)
    with pytest.raises(InputError, match=r"'colour' has no rule: pass .*RULES, \('colour', None\)"):
        tree_shardings(up, mesh, axes)
    rules = (*sharding.RULES, ("colour", ("tensor",)))
    assert tree_shardings(up, mesh, axes, rules)["up"]["kernel"].spec == P("fsdp", "tensor")
    with pytest.raises(InputError, match="names the mesh axis model: those of the mesh are data"):
        tree_shardings(up, mesh, axes, (*sharding.RULES, ("colour", ("model",))))

    x = jnp.ones((4, 8))
    with use_mesh(mesh, rules):
        assert tuple(constrain(x, ("batch", "colour")).sharding.spec) == (
            ("data", "fsdp"),
            "tensor",
        )


def test_two_names_on_one_mesh_axis_raise():
    up, axes = shape_tree("up/kernel", 8, 8), ((r"up/kernel", "heads -> mlp"),)
    with pytest.raises(InputError, match=r"\('heads', 'mlp'\) are split over the same mesh axis"):
        tree_shardings(up, make_mesh(CUBE), axes)
    # Where that mesh axis has size 1 there is no clash.
    tree_shardings(up, make_mesh(MeshConfig()), axes)


FOREIGN = {
    "params": {
        "Embed_0": {"embedding": jnp.zeros((32, 8))},
        "Dense_0": {"kernel": jnp.zeros((8, 16)), "bias": jnp.zeros(16)},
        "Block_0": {"Dense_0": {"kernel": jnp.zeros((16, 4)), "bias": jnp.zeros(4)}},
    },
    "lora": {
        "Dense_0": {"a": jnp.zeros((8, 2)), "b": jnp.zeros((2, 16))},
        "Embed_0": {"a": jnp.zeros((32, 2)), "b": jnp.zeros((2, 8))},
    },
}


def test_all_missing_rows_stand_in_one_error():
    mesh = make_mesh(CUBE)
    with pytest.raises(InputError) as error:
        tree_shardings(FOREIGN, mesh)
    named, _, rows = str(error.value).partition(": pass axes=(*sharding.AXES, ")
    assert named == (  # kernels and tables; not their adapters
        "no row of the axis table matches Dense_0/kernel, Embed_0/embedding, "
        "Block_0/Dense_0/bias, Block_0/Dense_0/kernel, Dense_0/bias"
    )
    # The rows can be pasted.
    axes = (*sharding.AXES, *ast.literal_eval(f"({rows.partition('), with')[0]},)"))
    found = {
        path: place.spec
        for path, place in tree.leaves_with_path(tree_shardings(FOREIGN, mesh, axes))
    }
    assert found["params/Dense_0/kernel"] == P("fsdp", "tensor")
    assert found["lora/Dense_0/b"] == P(None, "tensor")
    assert found["lora/Embed_0/a"] == P("tensor", None)
    # An adapter without its base, too, is known by its kernel.
    with pytest.raises(InputError, match=r"matches Dense_0/kernel: "):
        tree_shardings({"lora": {"Dense_0": FOREIGN["lora"]["Dense_0"]}}, mesh)


def test_one_device_needs_no_rows():
    places = tree_shardings(FOREIGN, make_mesh(MeshConfig(), jax.devices()[:1]))
    assert all(place.is_fully_replicated for place in jax.tree.leaves(places))


def test_indivisible_sizes_raise():
    message = "params/up/kernel: the axis mlp of size 9 cannot be split over tensor=2 devices"
    with pytest.raises(InputError, match=message):
        tree_shardings(shape_tree("params/up/kernel", 8, 9), make_mesh(CUBE))
    with pytest.raises(InputError, match=r"batch of size 6 cannot be split over data\*fsdp=4"):
        spec(("batch",), make_mesh(CUBE), (6,))
    assert tuple(spec(("batch",), make_mesh(CUBE), (8,))) == (("data", "fsdp"),)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3), "data=3, fsdp=1, tensor=1, sequence=1 does not fit 8 devices"),
        (MeshConfig(data=2, fsdp=2), "data=2, fsdp=2, .* does not fit 8 devices"),
        (MeshConfig(tensor=3), "data=None, .*tensor=3, .* does not fit 8 devices"),
        (MeshConfig(fsdp=16), "fsdp=16, .* does not fit 8 devices"),
        (MeshConfig(fsdp=0), "fsdp=0, .* does not fit 8 devices"),
        (MeshConfig(data=-1, fsdp=-8), "data=-1, fsdp=-8, .* does not fit 8 devices"),
    ],
)
def test_meshes_that_do_not_fit_raise(config, message):
    with pytest.raises(InputError, match=message):
        make_mesh(config)


def test_meshes_that_fit():
    assert dict(make_mesh(MeshConfig(tensor=2)).shape) == {
        "data": 4,
        "fsdp": 1,
        "tensor": 2,
        "sequence": 1,
    }
    assert make_mesh(MeshConfig(), jax.devices()[:1]).size == 1


@dataclass(frozen=True)
class Fake:
    """A device of a machine that is not here."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100"
    core_on_chip: int = 0

    @property
    def coords(self):
        return (self.id // 8 % 4, self.id % 8, 0)


def tpus(num_slices):
    """4x8 chips of each slice, the slices in turn, as they come over the network."""
    return [
        Fake(32 * part + i, (32 * part + i) // 4, part, "tpu", "TPU v6 lite")
        for i in range(32)
        for part in range(num_slices)
    ]


def test_slices_share_out_data_alone():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4, num_slices=2), tpus(2))
    assert dict(mesh.shape) == {"data": 8, "fsdp": 2, "tensor": 4, "sequence": 1}
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert (slices[:4] == 0).all()
    assert (slices[4:] == 1).all()


def test_one_axis_of_the_hardware_may_be_split_over_two_of_ours():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2), tpus(1))
    assert sorted(device.id for device in mesh.devices.flat) == list(range(32))
    # What talks most are neighbours: no two of a tensor group are further apart than one link.
    for first, second in mesh.devices.reshape(-1, 2):
        steps = np.subtract(first.coords, second.coords)
        assert np.abs(steps).sum() == 1


def test_other_devices_are_cut_into_groups_of_whole_hosts():
    # To JAX every host with GPUs is a slice; two hosts are one of ours here.
    gpus = [Fake(i, i // 2, i // 2) for i in (4, 5, 0, 1, 6, 7, 2, 3)]
    mesh = make_mesh(MeshConfig(fsdp=4, num_slices=2), gpus)
    hosts = np.vectorize(lambda device: device.process_index)(mesh.devices)
    assert set(hosts[0].flat) == {0, 1}
    assert set(hosts[1].flat) == {2, 3}
    assert make_mesh(MeshConfig(fsdp=8), gpus).shape["fsdp"] == 8
    on_cpus = make_mesh(MeshConfig(num_slices=4, tensor=2))
    assert [device.id for device in on_cpus.devices.flat] == list(range(8))


@pytest.mark.parametrize(
    ("config", "devices", "message"),
    [
        (MeshConfig(num_slices=3), None, "num_slices=3 does not divide 8 devices of 1 host "),
        (MeshConfig(num_slices=0), None, "num_slices=0 does not divide 8 devices"),
        (MeshConfig(fsdp=8, num_slices=2), None, "data=1 copies .* over num_slices=2"),
        (MeshConfig(num_slices=1), tpus(2), "num_slices=1, but the TPUs are of 2: set it to 2"),
        (MeshConfig(num_slices=2), tpus(1), "num_slices=2, but the TPUs are of 1: set it to 1"),
        (
            MeshConfig(num_slices=2),
            [Fake(i, i // 2, 0) for i in range(6)],
            "num_slices=2 does not divide 6 devices of 3 hosts",
        ),
    ],
)
def test_slices_that_do_not_fit_raise(config, devices, message):
    with pytest.raises(InputError, match=message):
        make_mesh(config, devices)


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (MeshConfig(), [((2 * i, 2 * i + 1), 8) for i in range(4)]),
        (MeshConfig(fsdp=2, tensor=2), [((i,), 4) for i in range(4)]),
        (MeshConfig(tensor=4), [((0,), 2), ((0,), 2), ((1,), 2), ((1,), 2)]),
        (MeshConfig(sequence=8), [((0,), 1)] * 4),
    ],
    ids=str,
)
def test_the_rows_of_each_of_four_processes(config, parts):
    mesh = make_mesh(config, [Fake(i, i // 2, 0) for i in range(8)])
    assert [process_rows(mesh, i) for i in range(4)] == parts


def test_the_rows_of_hosts_whose_devices_are_no_neighbours():
    mesh = make_mesh(MeshConfig(), [Fake(i, i % 2, 0) for i in range(4)])
    parts = [process_rows(mesh, i) for i in range(2)]
    assert [part.rows(8).tolist() for part in parts] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert [part.count for part in parts] == [2, 2]


def test_the_rows_of_a_batch_that_is_split_by_another_rule():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), [Fake(i, i // 2, 0) for i in range(8)])
    rules = (("batch", ("data", "tensor")),)
    assert [process_rows(mesh, i, rules) for i in range(4)] == [
        ((0, 1), 4),
        ((0, 1), 4),
        ((2, 3), 4),
        ((2, 3), 4),
    ]


def test_rows_that_processes_cannot_share_raise():
    mesh = make_mesh(MeshConfig(tensor=3), [Fake(i, i // 2, 0) for i in range(6)])
    with pytest.raises(InputError, match="different numbers of rows"):
        process_rows(mesh, 0)


def test_scalars_are_everywhere():
    places = tree_shardings({"count": jnp.zeros(())}, make_mesh(CUBE))
    assert tuple(places["count"].spec) == ()


def test_constrain_is_the_identity_without_a_mesh():
    x = jnp.ones((4, 4, 8))
    assert constrain(x, ("batch", "length", "embed")) is x
    text = str(jax.make_jaxpr(lambda x: constrain(x, ("batch", "length", "embed")))(x))
    assert "sharding_constraint" not in text


def test_constrain_lays_out_activations():
    mesh, x = make_mesh(MeshConfig(data=2, fsdp=2, sequence=2)), jnp.ones((4, 4, 8))

    @jax.jit
    def inside(x):
        with use_mesh(mesh):
            return constrain(x, ("batch", "length", "embed"))

    # `embed` stays whole in activations, though parameters are split over it.
    assert tuple(inside(x).sharding.spec) == (("data", "fsdp"), "sequence")
    assert constrain(x, ("batch", "length", "embed")) is x  # the mesh is forgotten again
    with use_mesh(mesh), pytest.raises(InputError, match="'colour' has no rule"):
        constrain(x, ("batch", "length", "colour"))
    with use_mesh(mesh), pytest.raises(InputError, match="length of size 3 cannot be split"):
        constrain(jnp.ones((4, 3, 8)), ("batch", "length", "embed"))


def test_a_mesh_of_other_axes_raises():
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    with pytest.raises(InputError, match="has the axes data, model, and no fsdp, sequence, tensor"):
        tree_shardings(shapes_of("TINY"), mesh)

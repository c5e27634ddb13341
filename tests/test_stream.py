"""One layer in memory at a time: the same salience, the same plan, the same bytes as the model in memory."""

import dataclasses
import warnings

import pytest
import torch
from families import FAMILIES, tiny
from tiny_models import contents, text_file, token_windows, write

import sfmp.pipeline as pipeline
from sfmp.allocate import make_plan, solve
from sfmp.compact_salience import load_problem, merged
from sfmp.model_source import load, skeleton
from sfmp.pipeline import Calibration, quantize_to_folder
from sfmp.salience import fisher_salience
from sfmp.spec import QuantSpec, SfmpError
from sfmp.stages import load_tokenizer
from sfmp.stream import NotStreamable, open_stream
from sfmp.stream_quantize import streamed_plan
from sfmp.stream_salience import fisher_by_layer
from sfmp.unfuse import linears_exposed

CPU = torch.device("cpu")
SPEC = QuantSpec(bpw=4.0, group_size=32, block_rows=32)


def _stream(folder, scratch, dtype="auto", skip=("lm_head",)):
    return open_stream(str(folder), skeleton(str(folder))[0], dtype, CPU, skip, scratch / "offloaded")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder of a tiny model by family, made once."""
    made, place = {}, tmp_path_factory.mktemp("models")

    def folder(family):
        if family not in made and family in FAMILIES:
            made[family] = place / family
            tiny(family, torch.bfloat16, vocab_size=4096).save_pretrained(made[family])
            load_tokenizer("embedded").save_pretrained(made[family])
        elif family not in made:
            made[family] = write(place / family, family)
        return made[family]

    return folder


# ---- salience


@pytest.mark.parametrize("family, dtype", [("llama", "bfloat16"), ("llama", "float32"), ("neox", "float32"),
                                           ("gpt2", "float32"), ("mixtral", "float32")])
def test_streamed_fisher_is_fisher(models, tmp_path, family, dtype):
    stream, windows = _stream(models(family), tmp_path, dtype), token_windows()
    stream.check(windows)
    found, order, readers = {}, [], set()
    for index, salience in fisher_by_layer(stream, windows, tmp_path):
        order.append(index)
        found |= salience
        readers |= set(salience.readers)
    assert order == [2, 1, 0]
    model, _ = load(str(models(family)), dtype, "cpu")
    expected = fisher_salience(model, windows)
    assert set(found) == set(expected) and readers == set(expected.readers)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32 and value.max() > 0
        # In one dtype sums of more than two gradients may be taken in another order; of a Llama there are only two.
        assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-6 * float(value.max())), name
        assert family != "llama" or torch.equal(found[name], value), name
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []


def test_one_layer_is_in_memory_and_gone_afterwards(models, tmp_path):
    stream, windows = _stream(models("llama"), tmp_path), token_windows()
    layers = [layer for _, layer in stream.layers]
    loaded, original = [], stream._load

    def count(index):
        original(index)
        loaded.append([number for number, layer in enumerate(layers)
                       if any(not p.is_meta for p in layer.parameters())])

    stream._load = count
    stream.check(windows)
    for index, _ in fisher_by_layer(stream, windows, tmp_path):
        assert not any(p.is_meta for p in layers[index].parameters())
    assert len(loaded) >= 9 and all(len(held) == 1 for held in loaded)
    assert all(p.is_meta for layer in layers for p in layer.parameters())
    assert not any(p.is_meta for name, p in stream.model.named_parameters() if ".layers." not in name)


def test_layers_read_from_disk_are_the_models(models, tmp_path):
    for family in ("llama", "mixtral", "gpt2"):
        stream = _stream(models(family), tmp_path)
        model, _ = load(str(models(family)), "auto", "cpu")
        ids = token_windows(1)
        with torch.no_grad(), stream.running() as streamed, linears_exposed(model):
            assert torch.equal(streamed(ids).logits, model(ids).logits)
        expected = dict(model.named_parameters())
        stream.exposed = []
        for index, (prefix, _) in enumerate(stream.layers):
            with stream.resident(index) as layer:
                for name, value in layer.named_parameters():
                    assert torch.equal(value, expected[f"{prefix}.{name}"])


def test_bad_windows_and_losses_are_named(models, tmp_path):
    stream = _stream(models("llama"), tmp_path)
    stream.check(token_windows())
    with pytest.raises(SfmpError, match="at least one sample"):
        next(fisher_by_layer(stream, [], tmp_path))
    with pytest.raises(SfmpError, match="0..4095"):
        next(fisher_by_layer(stream, torch.full((1, 8), 5000), tmp_path))
    with torch.no_grad():
        stream.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(SfmpError, match="loss of window 0: expected a finite"):
        next(fisher_by_layer(stream, token_windows(), tmp_path))


# ---- compact salience


@pytest.mark.parametrize("objective", ["paper", "measured"])
def test_plan_of_layers_is_the_plan(models, tmp_path, objective):
    spec = dataclasses.replace(SPEC, objective=objective, shared_columns=True)
    stream, windows = _stream(models("llama"), tmp_path), token_windows()
    stream.check(windows)
    plan = streamed_plan(stream, spec, windows, tmp_path)
    model, _ = load(str(models("llama")), "auto", "cpu")
    salience = fisher_salience(model, windows)
    assert plan.hash == make_plan(salience, spec, model).hash
    maps = sum(value.numel() * 4 for value in salience.values())
    stored = sum(path.stat().st_size for path in tmp_path.glob("salience-*"))
    assert stored < maps / 3  # of blocks as small as these; the permutations alone are a sixth of it
    if objective == "measured":
        return
    # The same files serve every other budget, level and scope.
    for other in (dataclasses.replace(spec, bpw=5.0, levels=(2, 4, 8)), dataclasses.replace(spec, scope="matrix")):
        problem = merged(load_problem(path, other) for path in sorted(tmp_path.glob("salience-*")))
        assert solve(problem).hash == make_plan(salience, other, model).hash


# ---- checkpoints


@pytest.fixture
def both(models, tmp_path, monkeypatch):
    """Quantize a model streamed, then in memory: (contents, contents)."""
    def run(family, spec, **options):
        calibration = Calibration(str(text_file(tmp_path)), 4, 48, options.pop("salience", "fisher"))
        arguments = str(models(family)), spec, calibration
        made = []
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="no gradient reached|awq: ")
            for way in ("streamed", "in_memory"):
                chosen = getattr(pipeline._Request, way)
                other = "in_memory" if way == "streamed" else "streamed"
                with monkeypatch.context() as patch:
                    patch.setattr(pipeline._Request, other, chosen)
                    plan = quantize_to_folder(arguments[0], tmp_path / way, *arguments[1:], device="cpu", **options)
                made.append((plan.hash, contents(tmp_path / way)))
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["in_memory", "streamed"]
        return made

    return run


@pytest.mark.parametrize("method", ["awq", "gptq", "rtn"])
def test_streamed_checkpoint_has_the_bytes_of_the_one_in_memory(both, method):
    streamed, in_memory = both("llama", dataclasses.replace(SPEC, method=method))
    assert streamed == in_memory


@pytest.mark.parametrize("family", ["neox", "gpt2", "mixtral", *FAMILIES])
def test_other_families_too(both, family):
    streamed, in_memory = both(family, SPEC)
    assert streamed == in_memory


def test_many_files_and_another_dtype_too(both):
    streamed, in_memory = both("llama", SPEC, max_shard_size="8KB", dtype="float32", base_model="owner/name@1")
    assert streamed == in_memory
    assert len([name for name in streamed[1] if name.endswith(".safetensors")]) > 3


@pytest.mark.parametrize("kind", ["magnitude", "random"])
def test_salience_without_data_too(both, kind):
    streamed, in_memory = both("llama", dataclasses.replace(SPEC, method="rtn"), salience=kind)
    assert streamed == in_memory


@pytest.mark.parametrize("layers", [(), (0,), (1, 2)], ids=str)
def test_skipped_matrices_stay(both, layers):
    projections = [f"self_attn.{key}_proj" for key in "qkvo"] + [f"mlp.{key}_proj" for key in ("gate", "up", "down")]
    whole = [f"model.layers.{layer}.{name}" for layer in layers for name in projections]
    skip = ("lm_head", "down_proj", "v_proj", *whole)
    streamed, in_memory = both("llama", dataclasses.replace(SPEC, skip=skip))
    assert streamed == in_memory
    if len(layers) == 1:
        method = dataclasses.replace(SPEC, skip=skip, method="rtn")
        assert both("llama", method, salience="random", overwrite=True)[0][1].keys() == streamed[1].keys()


# ---- what cannot be streamed


def test_what_cannot_be_streamed_says_why_and_is_quantized_in_memory(models, tmp_path):
    calibration = Calibration(str(text_file(tmp_path)), 2, 32, "activation")
    with pytest.warns(UserWarning, match="activation salience is not computed layer by layer: the whole model"):
        plan = quantize_to_folder(str(models("llama")), tmp_path / "out", SPEC, calibration, device="cpu")
    assert (tmp_path / "out" / "model.safetensors").exists() and len(plan) == 21
    with pytest.raises(NotStreamable, match="lm_head is to be quantized and lies outside"):
        _stream(models("llama"), tmp_path, skip=())


def test_layers_that_depend_on_more_than_the_hidden_state_are_noticed(models, tmp_path):
    stream = _stream(models("llama"), tmp_path)
    stream.check(token_windows())
    kept = []

    inner = stream.model.model
    original = type(inner.layers[1]).forward

    def keeping(layer, hidden, *args, left=None, **kwargs):
        kept.append(hidden)
        return original(layer, hidden, *args, **kwargs)

    class Given(type(inner.layers[1])):
        """Called with what the first layer returned, beside its own input."""

        forward = keeping

        def __call__(self, hidden, *args, **kwargs):
            return super().__call__(hidden, *args, left=kept[-1] if kept else hidden, **kwargs)

    for layer in inner.layers:
        layer.__class__ = Given
    with pytest.raises(NotStreamable, match="more than the hidden state"):
        stream.check(token_windows())


def test_layers_in_another_order_are_noticed(models, tmp_path):
    stream = _stream(models("llama"), tmp_path)
    stream.layers = stream.layers[::-1]
    with pytest.raises(NotStreamable, match="once each, in order"):
        stream.check(token_windows())


def test_shared_weights_are_noticed(models, tmp_path):
    empty, _ = skeleton(str(models("llama")))
    empty.model.layers[2].mlp.up_proj.weight = empty.model.layers[0].mlp.up_proj.weight
    with pytest.raises(NotStreamable, match="share weights"):
        open_stream(str(models("llama")), empty, "auto", CPU, ("lm_head",), tmp_path)

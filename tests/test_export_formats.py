"""skd.export: every format is loaded and run without skd, families have a manifest, and failures leave nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import nested, random_batches, tiny_vit
from timm.models.vision_transformer import ResPostBlock

import skd
from skd.cli import main
from skd.corrections import Correction
from skd.export import hub, read_manifest, writing
from skd.export.pt2 import compiled_path, has_compiler
from skd.extract import choose_entry
from skd.vit import OutputLayer, standalone

IMAGES = random_batches(dtype=torch.float32)[0][0]
LABELS = ["ant", "bee", "cat", "dog", "eel"]
# Of `tiny_vit`'s attention (16) and MLP (72): only MLPs narrower, another width everywhere, modules skipped.
ROWS = ([16, 24, 16, 24], [8, 24, 16, 5], [8, 0, 16, 5], [0, 0, 8, 5])


def supernet(**model: Any) -> skd.SuperNet:
    network = nested(skd.SuperNet(tiny_vit(torch.float32, **model)), *ROWS)
    network.model.pretrained_cfg = {**network.model.pretrained_cfg, "label_names": LABELS, "mean": (0.1, 0.2, 0.3)}
    return network


def expected(network: skd.SuperNet, entry: int) -> torch.Tensor:
    with torch.no_grad():
        return network(IMAGES, entry=entry)


def without_skd(code: str, folder: Path) -> None:
    """Run `code` in `folder`, in a process that cannot import skd."""
    blocked = "import sys\nsys.modules['skd'] = sys.modules['skd_kernels'] = None\n"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-W", "ignore", "-c", blocked + code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


CHECK = """
import sys, timm, torch
images, expected = torch.load("expected.pt")
for folder, logits in expected.items():
    sys.modules.pop("model", None)
    sys.path.insert(0, folder)
    from model import load
    network = load(folder)
    torch.testing.assert_close(network(images), logits, rtol=1e-5, atol=1e-5)
    for block in network.blocks:  # timm's own arithmetic, where PyTorch's attention is switched off
        block.attn.fused_attn = False
    torch.testing.assert_close(network(images), logits, rtol=1e-5, atol=1e-5)
    data = timm.data.resolve_model_data_config(network)
    assert tuple(data["mean"]) == (0.1, 0.2, 0.3) and tuple(data["input_size"]) == (3, 32, 32), data
    assert not network.training and network.pretrained_cfg["label_names"][1] == "bee"
"""


def test_a_folder_loads_itself_without_skd(tmp_path: Path) -> None:
    """By its model.py, which is short; timm says what the folder is."""
    networks = {"plain": supernet(), "post-norm": supernet(init_values=0.1, block_fn=ResPostBlock)}
    logits = {}
    for name, network in networks.items():
        for entry in (2, 3, 4):
            (member,) = skd.export(network, tmp_path / f"{name}-{entry}", entry=entry)
            assert member["layout"] == "model.py" and member["macs"] == skd.cost(network, entry=entry).macs
            logits[f"{name}-{entry}"] = expected(network, entry)
    torch.save((IMAGES, logits), tmp_path / "expected.pt")
    without_skd(CHECK, tmp_path)
    assert len(Path(standalone.__file__).read_text().splitlines()) <= 80
    with pytest.raises(RuntimeError, match=r"loaded by its model\.py"):
        timm.create_model(f"local-dir:{tmp_path / 'plain-2'}", pretrained=True)


HEADS: dict[str, dict[str, Any]] = {
    "vit_small_patch16_dinov3_qkvb": {},
    "eva02_base_patch14_224": {"scale_mlp": False, "patch_size": 16},
    "beit_base_patch16_224": {},
}


@pytest.mark.parametrize("name", HEADS)
def test_other_families_in_folders(name: str, tmp_path: Path) -> None:
    """Heads that are left out, q and k in layers of their own, biases of positions; and the full networks."""
    torch.manual_seed(0)
    size = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5, "init_values": 0.5}
    network = skd.SuperNet(timm.create_model(name, **size, **HEADS[name]).eval())
    full = network.widths()
    nested(network, [full[0] if network.infos[0].binary else 2, 24, full[2], 8], [0, 24, full[2], 0], [0, 24, 0, 0])
    (member,) = skd.export(network, tmp_path / "full", entry=0)
    assert member["layout"] == "timm"
    model = timm.create_model(f"local-dir:{tmp_path / 'full'}", pretrained=True).eval()
    torch.testing.assert_close(model(IMAGES), expected(network, 0))
    for entry in (1, 2, 3):
        (member,) = skd.export(network, tmp_path / f"{entry}", entry=entry)
        assert member["layout"] == "model.py"
        torch.testing.assert_close(standalone.load(tmp_path / f"{entry}")(IMAGES), expected(network, entry))


@pytest.mark.parametrize("entry", [0, 1], ids=["full", "narrower MLPs"])
def test_what_timm_can_build_is_written_for_timm(entry: int, tmp_path: Path) -> None:
    network = supernet()
    (member,) = skd.export(network, tmp_path / "full", entry=entry)
    assert member["layout"] == "timm" and not (tmp_path / "full" / "model.py").exists()
    model = timm.create_model(f"local-dir:{tmp_path / 'full'}", pretrained=True).eval()
    assert torch.equal(model(IMAGES), skd.extract(network, entry=entry)(IMAGES))
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    assert {"architecture", "num_classes", "pretrained_cfg", "model_args"} <= config.keys()
    assert config["label_names"] == LABELS
    assert tuple(timm.data.resolve_model_data_config(model)["mean"]) == (0.1, 0.2, 0.3)
    transformers = pytest.importorskip("transformers")  # as TimmWrapper does it
    wrapper = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path / "full").eval()
    torch.testing.assert_close(wrapper(IMAGES).logits, model(IMAGES))


def test_a_model_of_timms_names_keeps_its_name(tmp_path: Path) -> None:
    size = {"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 5}
    model = timm.create_model("deit3_small_patch16_224", **size).eval()
    (member,) = skd.export(model, tmp_path / "out")
    assert member["layout"] == "timm" and member["entry"] is None
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "deit3_small_patch16_224"
    assert not {"license", "tag"} & config["pretrained_cfg"].keys()  # of timm's weights of that name
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(again(IMAGES), model(IMAGES))


@pytest.mark.filterwarnings("ignore")
def test_onnx(tmp_path: Path) -> None:
    """Skipped modules too; any number of images; the classes and the preprocessing are in the file."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network = supernet()
    skd.export(network, tmp_path / "sub.onnx", format="onnx", entry=3)
    session = runtime.InferenceSession(str(tmp_path / "sub.onnx"), providers=["CPUExecutionProvider"])
    for count in (1, 2, 4):
        found = torch.from_numpy(session.run(None, {"images": IMAGES[:count].numpy()})[0])
        torch.testing.assert_close(found, expected(network, 3)[:count], rtol=0, atol=1e-4)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["label_names"]) == LABELS and json.loads(about["preprocessing"])["mean"][0] == 0.1
    assert [path.name for path in tmp_path.iterdir()] == ["sub.onnx"]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Entry 3 as a program of torch.export, which takes seconds to write."""
    file = tmp_path_factory.mktemp("pt2") / "sub.pt2"
    skd.export(supernet(), file, format="pt2", entry=3, compiled=False)
    return file


def test_pt2(program: Path) -> None:
    """Skipped modules too; any number of images; the same texts in the file."""
    about = {"preprocessing": "", "label_names": ""}
    found = torch.export.load(program, extra_files=about).module()
    for count in (1, 2, 4):
        torch.testing.assert_close(found(IMAGES[:count]), expected(supernet(), 3)[:count])
    assert json.loads(about["label_names"]) == LABELS and json.loads(about["preprocessing"])["mean"][0] == 0.1
    assert [path.name for path in program.parent.iterdir()] == ["sub.pt2"]


@pytest.mark.slow
def test_a_compiled_package(tmp_path: Path) -> None:
    if not has_compiler():
        pytest.skip("no C++ compiler")
    network = supernet()
    (member,) = skd.export(network, tmp_path / "sub.pt2", format="pt2", entry=3)
    assert set(member["files"]) == {"sub.pt2", "sub.aoti.pt2"}
    package = torch._inductor.aoti_load_package(str(compiled_path(tmp_path / "sub.pt2")))
    for count in (1, 4):
        torch.testing.assert_close(package(IMAGES[:count]), expected(network, 3)[:count], rtol=1e-5, atol=1e-5)


def test_the_compiler_is_the_one_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not any that is there: AOTInductor does not look for clang++ where g++ is missing."""
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    assert not has_compiler()
    with pytest.raises(ValueError, match=r"no C\+\+ compiler"):
        skd.export(tiny_vit(torch.float32), "never.pt2", format="pt2", compiled=True)
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "c++")
    assert has_compiler()


def test_an_older_compiled_package_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def written(model: Any, path: Path, compiled: bool | None, **_: Any) -> str:
        path.write_text("program")
        if compiled:
            compiled_path(path).write_text("package")
        return "pt2"

    monkeypatch.setitem(writing.FORMATS, "pt2", writing.Format(".pt2", written))
    package = tmp_path / "sub.aoti.pt2"
    for compiled in (True, False):
        skd.export(tiny_vit(torch.float32), tmp_path / "sub.pt2", format="pt2", compiled=compiled)
        assert package.exists() == compiled
    package.mkdir()
    with pytest.raises(ValueError, match=r"sub\.aoti\.pt2', a folder; it must be a file"):
        skd.export(tiny_vit(torch.float32), tmp_path / "sub.pt2", format="pt2", compiled=True)


def test_a_link_is_judged_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        writing.FORMATS, "onnx", writing.Format(".onnx", lambda model, path: str(path.write_text("new")))
    )
    (tmp_path / "latest.onnx").symlink_to("first")
    skd.export(tiny_vit(torch.float32), tmp_path / "latest.onnx", format="onnx")
    assert (tmp_path / "latest.onnx").is_symlink() and (tmp_path / "first").read_text() == "new"


def test_corrections_are_folded_in(tmp_path: Path) -> None:
    network = supernet()
    network.corrections = {2: Correction((8, 24, 16, 5), {"1.mlp": OutputLayer(torch.ones(48, 5), torch.ones(48))})}
    for name, corrected in (("with", True), ("without", False)):
        (member,) = skd.export(network, tmp_path / name, entry=2, corrected=corrected)
        assert member["compensated"] is corrected
        sub = skd.extract(network, entry=2, corrected=corrected)
        torch.testing.assert_close(standalone.load(tmp_path / name)(IMAGES), sub(IMAGES))


def test_moments_are_a_correction_too(tmp_path: Path) -> None:
    network = supernet()
    skd.moments(network, random_batches(dtype=torch.float32))
    for corrected in ("moments", True):
        (member,) = skd.export(network, tmp_path / str(corrected), entry=2, corrected=corrected)
        assert member["compensated"] is (corrected == "moments")
        sub = skd.extract(network, entry=2, corrected=corrected)
        torch.testing.assert_close(standalone.load(tmp_path / str(corrected))(IMAGES), sub(IMAGES))


def test_a_family_has_a_manifest(tmp_path: Path) -> None:
    network = supernet()
    (tmp_path / "out").mkdir()
    given = skd.export(network, tmp_path / "out", shares=[0.5, 1.0, 0.45], top1={0: 80.5})
    members = read_manifest(tmp_path / "out")
    assert members == given and [member["share"] for member in members] == [1.0, 0.5]
    full, half = members
    assert full["entry"] == 0 and full["top1"] == 80.5 and half["top1"] is full["latency_ms"] is None
    assert half["macs"] == skd.cost(network, entry=half["entry"]).macs <= full["macs"] / 2
    assert half["macs_linear"] == skd.cost(network, entry=half["entry"], convention="linear").macs
    assert set(half["files"]) == {f"macs-0.5/{name}" for name in ("config.json", "model.py", "model.safetensors")}
    torch.testing.assert_close(
        standalone.load(tmp_path / "out" / "macs-0.5")(IMAGES), expected(network, half["entry"])
    )
    (tmp_path / "out" / "macs-0.5" / "model.py").write_text("changed")
    assert read_manifest(tmp_path / "out", verify=False) == members
    with pytest.raises(ValueError, match=r"macs-0\.5/model\.py in .* its SHA-256 differs"):
        read_manifest(tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/passwd",
        "a/../../secret",
        "",
        ".",
        "c:secret",
        "a\\b",
        "link",
        "folder/secret",
        "gone",
        "long" * 2000,
        3,
    ],
)
def test_a_manifest_cannot_lead_out_of_its_folder(name: Any, tmp_path: Path) -> None:
    folder, outside = tmp_path / "family", tmp_path / "outside"
    skd.export(supernet(), folder, shares=[1.0])
    outside.mkdir()
    for secret in (outside / "secret", tmp_path / "secret"):
        secret.write_text("secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "folder").symlink_to(outside)
    document = json.loads((folder / "manifest.json").read_text())
    text = json.dumps(document).replace('"macs-1.0/config.json"', json.dumps(name) if name != 3 else '"3"')
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json names the file"):
        read_manifest(folder, verify=False)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 2, "members": []}', '{"version": 1, "members": [{"files": {}}]}']
)
def test_a_damaged_manifest(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="manifest"):
        read_manifest(tmp_path)
    with pytest.raises(ValueError, match="No such file"):
        read_manifest(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("out", "options", "told"),
    [
        ("new", {"format": "tflite"}, r"format is 'tflite'; it may be one of \['timm', 'onnx', 'pt2'\]"),
        ("new", {"format": "onnx", "entry": 0}, r"must end in \.onnx"),
        ("full", {"entry": 0}, "a folder that is not empty"),
        ("file", {"entry": 0}, "a file; it must be a new folder"),
        ("nowhere/new", {"entry": 0}, "cannot be written"),
        ("new", {}, "exactly one of macs, params, entry, latency_ms, shares"),
        ("new", {"entry": 0, "shares": [0.5]}, "exactly one"),
        ("new", {"shares": [1.5]}, "shares is"),
        ("new", {"shares": []}, "shares is"),
        ("new", {"shares": (share for share in [0.5])}, "shares is"),
        ("new", {"macs": 0.01}, "smallest sub-network"),
        ("new", {"entry": 9}, "entry is 9"),
        ("new", {"entry": 0, "compiled": True}, "goes with 'pt2' alone"),
        ("new", {"entry": 0, "compiled": False}, "compiled is False, .* goes with 'pt2' alone"),
        ("new", {"entry": 0, "top1": {9: 80.0}}, "entry is 9"),
        ("new", {"entry": 0, "device": "nonsense"}, "device is 'nonsense'"),
    ],
)
def test_mistakes(out: str, options: dict[str, Any], told: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=told):
        skd.export(supernet(), tmp_path / out, **options)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "kept"]


def test_a_plain_model_has_no_budget(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="macs is given with a plain model"):
        skd.export(tiny_vit(torch.float32), tmp_path / "new", macs=0.5)
    for name, value in {"convention": "linear", "corrected": False, "top1": {0: 80.0}}.items():
        with pytest.raises(ValueError, match=f"{name} is .*, with a plain model"):
            skd.export(tiny_vit(torch.float32), tmp_path / "new", **{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model is a"):
        skd.export(torch.nn.Linear(1, 1), tmp_path / "new")


@pytest.mark.parametrize("entry", [0, 2], ids=["timm", "model.py"])
def test_all_files_have_the_usual_permissions(entry: int, tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    skd.export(supernet(), tmp_path / "out", entry=entry)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "new").stat().st_mode & 0o777}


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a family, and where a file is replaced."""
    (tmp_path / "sub.pt2").write_text("before")
    network, number = supernet(), iter(range(9))

    def fails(model: Any, path: Path, **_: Any) -> str:
        path.mkdir()
        (path / "half").touch()
        if next(number):
            raise OSError("disk full")
        return "timm"

    monkeypatch.setitem(writing.FORMATS, "timm", writing.Format("", fails))
    with pytest.raises(OSError, match="disk full"):
        skd.export(network, tmp_path / "new", shares=[0.5, 1.0])
    monkeypatch.setitem(writing.FORMATS, "pt2", writing.Format(".pt2", fails))
    with pytest.raises(OSError, match="disk full"):
        skd.export(network, tmp_path / "sub.pt2", format="pt2", entry=0)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("sub.pt2", "before")]


def test_a_layer_that_was_changed_by_hand_is_noticed(tmp_path: Path) -> None:
    """Neither timm's arguments nor model.py can say it, although every tensor fits."""
    model = tiny_vit(torch.float32)
    model.norm.eps = 0.5
    with pytest.raises(ValueError, match=r"what model\.py builds differs from the network"):
        skd.export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_computes_something_else_is_noticed() -> None:
    from skd.export.comparison import compare

    model = tiny_vit(torch.float32)
    compare(model, model, 1e-6, "the model")
    with pytest.raises(ValueError, match="the other differs from the network by"):
        compare(model, lambda images: model(images) + 1e-3 * (len(images) == 3), 1e-4, "the other")
    with pytest.raises(ValueError, match="differs"):
        compare(model, lambda images: model(images) * torch.nan, 1e-4, "the other")


class Uploads:
    """In place of huggingface_hub's HfApi: what it would have uploaded."""

    def __init__(self, token: str | None, library_name: str) -> None:
        assert (token, library_name) == ("secret", "skd")

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> None:
        assert repo_id == "me/net" and private and exist_ok

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str, delete_patterns: str) -> Any:
        assert delete_patterns == "*"
        Uploads.files = {path.relative_to(folder_path).as_posix(): path for path in folder_path.rglob("*")}
        Uploads.card = Uploads.files["README.md"].read_text()
        Uploads.code = re.findall(r"```python\n(.*?)```", Uploads.card, flags=re.DOTALL)
        Uploads.check(folder_path)
        return type("Commit", (), {"commit_url": f"https://huggingface.co/{repo_id}/commit/1"})

    files: dict[str, Path]
    card: str
    code: list[str]
    check: Any


@pytest.mark.parametrize(
    "options", [{"entry": 0}, {"entry": 3}, {"shares": [1.0, 0.5]}, {"entry": 3, "format": "pt2"}]
)
def test_push_to_hub(options: dict[str, Any], program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that is uploaded is whole, and the code in its card loads it."""
    import huggingface_hub

    network = supernet()
    last = choose_entry(network, macs=0.5) if "shares" in options else options["entry"]

    def copied(model: Any, path: Path, **_: Any) -> str:
        shutil.copy(program, path)
        return "pt2"

    def runs_as_the_card_says(folder: Path) -> None:
        def found(repo: str, name: str = "") -> str:
            assert repo == "me/net"
            return str(folder / name)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", found)
        monkeypatch.setattr(sys, "path", list(sys.path))
        for code in Uploads.code:
            sys.modules.pop("model", None)
            names: dict[str, Any] = {"images": IMAGES}
            exec(code.replace("hf-hub:me/net", f"local-dir:{folder}"), names)  # nothing is downloaded
        assert len(Uploads.code) == 1 + ("shares" in options)
        torch.testing.assert_close(names["model"](IMAGES), expected(network, last))

    monkeypatch.setattr(hub, "HfApi", Uploads)
    monkeypatch.setattr(Uploads, "check", runs_as_the_card_says, raising=False)
    monkeypatch.setitem(writing.FORMATS, "pt2", writing.Format(".pt2", copied))
    address = skd.push_to_hub(
        network, "me/net", private=True, token="secret", license="mit", top1={4: 71.25}, **options
    )
    assert address.endswith("/me/net/commit/1")
    card = Uploads.card
    assert "license: mit" in card and "pipeline_tag: image-classification" in card
    assert ("library_name: timm" in card) == (options == {"entry": 0})
    assert f"{skd.cost(network, entry=last).macs:,}" in card and "## The curve" in card
    assert ("71.25" in card) and ("manifest.json" in Uploads.files) == ("shares" in options)


@pytest.mark.parametrize("classes", [0, 5])
def test_the_card_of_a_plain_model(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was cut out of nothing, and perhaps does not classify; timm's default weights have a license, not these."""
    cards = []
    monkeypatch.setattr(hub, "upload", lambda folder, *_, **__: cards.append((folder / "README.md").read_text()))
    size = {"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": classes}
    skd.push_to_hub(timm.create_model("deit3_small_patch16_224", **size).eval(), "me/net")
    (card,) = cards
    assert "super-network" not in card and "license" not in card and "deit3_small_patch16_224" in card
    assert ("image-classification" in card) == ("AutoModelForImageClassification" in card) == bool(classes)


@pytest.mark.parametrize("repo", ["net", "me/", "a/b/c", 3])
def test_a_name_that_is_no_repository(repo: Any) -> None:
    with pytest.raises(ValueError, match="repo_id is"):
        skd.push_to_hub(supernet(), repo, entry=0)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    network = supernet()
    skd.save(network, "net.safetensors")
    skd.save(skd.extract(network, entry=2), "sub.safetensors")
    half = choose_entry(network, macs=0.5)
    Path("top1.json").write_text(
        json.dumps({"curve": [{"entry": half, "top1": 66.0, "macs": skd.cost(network, entry=half).macs}]})
    )
    for name, entry in (("other", half), ("more", 9)):
        Path(f"{name}.json").write_text(json.dumps({"entry": entry, "top1": 66.0, "macs": 1}))
    common = ["export", "--supernet", "net.safetensors", "--json", "out.json"]
    assert main([*common, "--entry", "0", "--out", "full"]) == 0
    assert "timm alone loads it" in capsys.readouterr().out
    assert main([*common, "--all", "0.5,1", "--evaluated", "top1.json", "--out", "family"]) == 0
    assert "its own model.py loads it" in capsys.readouterr().out
    assert read_manifest("family") == json.loads(Path("out.json").read_text())["members"]
    assert [member["top1"] for member in read_manifest("family")] == [None, 66.0]
    corrected = json.loads(Path("top1.json").read_text()) | {"corrections": [{"entry": half}]}
    Path("corrected.json").write_text(json.dumps(corrected))
    assert main([*common, "--all", "0.5", "--evaluated", "corrected.json", "--out", "without"]) == 0
    assert f"entry {half} was measured with a correction and is written without one" in capsys.readouterr().out
    assert [member["top1"] for member in read_manifest("without")] == [None]
    assert main(["export", "--model", "sub.safetensors", "--out", "sub"]) == 0
    torch.testing.assert_close(standalone.load("sub")(IMAGES), expected(network, 2))
    for more, told in (
        (["--supernet", "sub.safetensors", "--entry", "0"], "which is for --model"),
        (["--model", "net.safetensors"], "which is for --supernet"),
        (["--supernet", "net.safetensors"], "exactly one of"),
        (["--supernet", "net.safetensors", "--all", "1", "--evaluated", "other.json"], "of another super-network"),
        (["--supernet", "net.safetensors", "--all", "1", "--evaluated", "more.json"], "entry is 9"),
        (["--supernet", "net.safetensors", "--entry", "2", "--compensate", "moments"], "moments"),
        (["--model", "sub.safetensors", "--uncorrected"], "corrected is False, with a plain model"),
        (["--model", "sub.safetensors", "--evaluated", "top1.json"], "top1 is"),
        (["--model", "sub.safetensors", "--no-compiled"], "compiled is False, but format is 'timm'"),
        (["--supernet", "net.safetensors", "--all", "1", "--evaluated", "net.safetensors"], "--evaluated is"),
    ):
        assert main(["export", *more, "--out", "new"]) == 2
        assert told in capsys.readouterr().err

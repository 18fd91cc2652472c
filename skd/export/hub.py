"""Uploading to a hub of Hugging Face, through huggingface_hub, which comes with timm."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Unpack

from huggingface_hub import HfApi
from torch import nn

from skd.export.card import card
from skd.export.manifest import Member
from skd.export.writing import FORMATS, Options, export
from skd.supernet import SuperNet
from skd.support.curve import Rows, sizes_of, usual_entries
from skd.vit import TimmModel, unwrapped


def push_to_hub(
    network: nn.Module,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Add the network",
    license: str | None = None,
    **options: Unpack[Options],
) -> str:
    """Export a network and upload it with a model card: its sizes, the curve of the super-network, how to load it.

    Args:
        network: as for `skd.export`.
        repo_id: "USER/NAME"; the repository is created if it is not there, and files that it has are
            deleted in the same commit (the history keeps them).
        private: whether a new repository is.
        token: of the hub; None: that of ``hf auth login``.
        license: of the weights, as the hub calls it; None: the card says nothing.
        options: those of `skd.export`: format, a budget or `shares`, top1, ...

    Returns:
        The address of the commit.

    Raises:
        ValueError: a bad name, and as `skd.export`.
        OSError: the upload failed, also because the token is refused (huggingface_hub's HfHubHTTPError).
    """
    if not isinstance(repo_id, str) or repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise ValueError(f"repo_id is {repo_id!r}; it must be 'USER/NAME'")
    network = unwrapped(network)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "repository"
        members = _exported(network, folder, options)
        model: TimmModel = network.model if isinstance(network, SuperNet) else network
        about = getattr(model, "pretrained_cfg", {})
        named = about.get("architecture")
        text = card(repo_id, members, _curve(network, options), named, license, model.num_classes)
        (folder / "README.md").write_text(text, encoding="utf-8")
        return upload(folder, repo_id, private=private, token=token, commit_message=commit_message)


def upload(folder: Path, repo_id: str, *, private: bool, token: str | None, commit_message: str) -> str:
    """One commit after which the repository has the files of `folder` and no others; it is created if need be."""
    api = HfApi(token=token, library_name="skd")
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, commit_message=commit_message, delete_patterns="*"
    )
    return str(commit.commit_url)


def _exported(network: nn.Module, folder: Path, options: Options) -> dict[str, Member]:
    """Write the network into `folder`; what is there, by its path ("": the folder itself)."""
    ending = FORMATS[options["format"]].ending if options.get("format") in FORMATS else ""
    if options.get("shares") is not None:
        members = export(network, folder, **options)
        return {min(member["files"], key=len).split("/")[0]: member for member in members}
    if not ending:
        (member,) = export(network, folder, **options)
        return {"": member}
    folder.mkdir()
    (member,) = export(network, folder / f"model{ending}", **options)
    return {f"model{ending}": member}


def _curve(network: nn.Module, options: Options) -> Rows:
    """Sizes of the super-network within the usual budgets, and their top-1 where it is known."""
    if not isinstance(network, SuperNet):
        return []
    known, rows = options.get("top1") or {}, sizes_of(network, usual_entries(network))
    for row in rows:
        if row["entry"] in known:
            row["top1"] = float(known[row["entry"]])
    return rows

"""The artifact of `proposals`, written from the journals: the store, the report and its pictures."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from aligndet_cli.artifacts.proposals import ORIGINS, STORE_FILES, ImageProposals, ProposalStore, write_store
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.errors import DataError
from aligndet_cli.files import write_bytes, write_json
from aligndet_cli.logs import logger
from aligndet_cli.plotting import never_failing
from aligndet_cli.proposals.journal import ImageResult, Journals
from aligndet_cli.proposals.pictures import draw_histograms, draw_proposal_sheet, draw_recall
from aligndet_cli.proposals.report import describe_store
from aligndet_cli.proposals.rounds import FROM_RUN
from aligndet_cli.workspace import Output


def write_artifact(
    output: Output, journals: Journals, image_set: ImageSet, *, min_size: float, on_error: Literal["skip", "fail"]
) -> None:
    """Write all files of the artifact and complete it; with origins if the journals have them.

    Raises:
        DataError: no image was readable, or one was left out and may not be.
    """
    digests, num_skipped = _write_store(output, journals, image_set, on_error)
    result = _write_report(output, image_set, min_size, digests, num_skipped)
    content = [*STORE_FILES]
    if journals.with_origins:
        is_of_run = np.load(output.partial / ORIGINS, mmap_mode="r")[:, 1] == FROM_RUN
        result["proposals_of_run"] = int(is_of_run.sum())
        content.append(ORIGINS)
    output.complete(result, content)


def skipped_error(image_set: ImageSet, result: ImageResult) -> DataError:
    """Return the error for an image that was left out although `on_error` is `fail`."""
    path = image_set.images_dir / image_set.file_names[result.position]
    return DataError(f"{path}: {result.reason} (--on-error skip leaves it out)")


def _write_store(output: Output, journals: Journals, image_set: ImageSet, on_error: str) -> tuple[list[int], int]:
    """Write the images in the order of the data set; return the digests of their files, and how many were left out."""
    skipped: list[dict[str, Any]] = []
    digests: list[int] = []

    def all_images() -> Iterator[ImageProposals]:
        for result in journals.in_order():
            image_id, name = int(image_set.image_ids[result.position]), image_set.file_names[result.position]
            if not result.reason:
                digests.append(result.digest)
                yield ImageProposals(image_id, name, result.size_hw, result.boxes, result.origins)
            elif on_error == "fail":
                raise skipped_error(image_set, result)
            else:
                skipped.append({"image_id": image_id, "file": name, "reason": result.reason})

    write_store(output.partial, all_images(), with_origins=journals.with_origins)
    lines = "".join(json.dumps(entry) + "\n" for entry in skipped)
    write_bytes(output.partial / "skipped.jsonl", lines.encode())
    if not digests:
        # Nothing is worth resuming: once the images are repaired, the same command must look at them again. Without
        # its manifest the partial folder is started anew, not refused because the data has changed.
        (output.partial / "manifest.json").unlink()
        reason = "{file}: {reason}".format(**skipped[0]) if skipped else "there are none"
        raise DataError(f"{image_set.images_dir}: none of {len(skipped)} images could be used; the first: {reason}")
    if skipped:
        logger.warning("%d images skipped, see %s", len(skipped), output.folder / "skipped.jsonl")
    return digests, len(skipped)


def _write_report(
    output: Output, image_set: ImageSet, min_size: float, digests: list[int], num_skipped: int
) -> dict[str, Any]:
    """Write report and pictures; return the summary for the manifest."""
    partial, store = output.partial, ProposalStore(output.partial)
    report = describe_store(store, image_set, min_size, digests)
    write_json(partial / "report.json", {"skipped_images": num_skipped, **report})
    with never_failing(partial / "sheet.jpg"):
        draw_proposal_sheet(partial / "sheet.jpg", store, image_set)
    with never_failing(partial / "plots"):
        draw_histograms(partial / "plots", store)
    result = {
        "images": len(store),
        "proposals": store.total,
        "proposals_per_image": round(store.total / len(store), 2),
        "images_without_proposals": report["images_without_proposals"],
        "skipped_images": num_skipped,
    }
    labels = report["labels"]
    if labels is not None and labels["all"]["objects"]:
        with never_failing(partial / "plots" / "recall.png"):
            draw_recall(partial / "plots" / "recall.png", labels)
        result["recall_at_iou_0.5"] = labels["all"]["recall_at_iou_0.5"]["all"]
        result["mean_best_overlap"] = labels["all"]["mean_best_overlap"]["all"]
        result["average_recall_at_100"] = labels["all"]["average_recall"]["100"]
        result["precision_at_15"] = labels["precision_at_iou_0.5"]["15"]
    return result

"""`aligndet cluster`: proposals -> one pseudo class per proposal, from backbone features, PCA and k-means, or a file.

Source: docs/paper.md §8.1, §8.2: RoIAlign features of the proposals, PCA to 256 dimensions, k-means to 256 clusters.
The authors never published their code; comments below name what they left open and we decided (docs/differences.md 6).
"""

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from aligndet_cli.arrays import save_array, save_arrays
from aligndet_cli.artifacts.exchange import hash_file
from aligndet_cli.artifacts.open import open_proposals
from aligndet_cli.backbones import RANDOM_WEIGHTS, BackboneWeights, build_backbone
from aligndet_cli.backbones.build import require_single
from aligndet_cli.backbones.checks import check_weights
from aligndet_cli.backbones.weights import find_backbone_weights, load_backbone_weights, require_trained
from aligndet_cli.cluster import kmeans
from aligndet_cli.cluster.config import ClusterConfig
from aligndet_cli.cluster.features import ProposalImages, find_places, write_features
from aligndet_cli.cluster.given import GivenClusters, clusters_from_coco
from aligndet_cli.cluster.report import build_report, build_size_report, find_problems, histogram_lines
from aligndet_cli.cluster.rows import DoneMarks, RowFile, Watch
from aligndet_cli.cluster.sheet import draw_cluster_sheet, draw_sizes
from aligndet_cli.config import StageConfig
from aligndet_cli.errors import ConfigError
from aligndet_cli.files import write_json
from aligndet_cli.logs import Progress, logger
from aligndet_cli.plotting import never_failing
from aligndet_cli.processes.collectives import wait_for_all
from aligndet_cli.processes.devices import Process
from aligndet_cli.processes.signals import StopSignal, stop_on_signal
from aligndet_cli.stage import Steps
from aligndet_cli.training.placement import place
from aligndet_cli.workspace import Output, Workspace


@dataclass(frozen=True)
class Plan:
    """Everything that `run` needs.

    Attributes:
        source: images with proposals, in batches.
        proposals_name: name of their artifact.
        given: clusters to import, unless the run is finished.
        weights: weights of the backbone, to make clusters.
        num_channels: C, channels of the features.
    """

    config: ClusterConfig
    output: Output
    source: ProposalImages
    proposals_name: str
    given: GivenClusters | None = None
    weights: BackboneWeights = RANDOM_WEIGHTS
    num_channels: int = 0

    @property
    def num_rows(self) -> int:
        """Number of proposals, M."""
        return self.source.store.total


def prepare(config: ClusterConfig, workspace: Workspace, *, resume: bool = True, force: bool = False) -> Plan:
    """Open proposals, images and weights, or the file to import, and decide what to do; nothing is written.

    Raises:
        ConfigError: no proposals, too few for `k` or `pca_dim`, proposals of other data, settings that cannot take
            effect, or a finished run with other settings.
        WeightsError: the backbone's weights cannot be found.
        DataError: the imported file cannot be used, or lacks a proposal.
    """
    _check_settings(config)
    store, images, artifact = open_proposals(workspace, config.proposals, config.data)
    if store.total == 0:
        raise ConfigError(f"{artifact.folder}: holds no proposals at all; make some with looser filters")
    source = ProposalImages(images, store, find_places(store, images), config.batch_size)
    inputs = {"data": images.fingerprint, "proposals": artifact.content_hash}
    if config.import_file is not None:
        inputs["import"] = hash_file(config.import_file)
        name = config.name or f"{artifact.name}-imported"
        output = workspace.plan_output("cluster", name, config, inputs, resume=resume, force=force)
        is_complete = output.action == "complete"
        given = None if is_complete else clusters_from_coco(config.import_file, store, images)
        return Plan(config, output, source, artifact.name, given)
    require_single(config.backbone.name, "cluster")
    with torch.device("meta"):  # built only to ask for its width
        num_channels = build_backbone(config.backbone).channels[config.level]
    weights = find_backbone_weights(config.backbone, workspace, offline=config.runtime.offline)
    inputs["weights"] = weights.content_hash
    name = config.name or f"{artifact.name}-k{config.k}"
    output = workspace.plan_output("cluster", name, config, inputs, resume=resume, force=force)
    if output.action != "complete":
        kmeans.check_sizes(store.total, num_channels, config)
        require_trained(weights, config.backbone, "cluster")
    return Plan(config, output, source, artifact.name, weights=weights, num_channels=num_channels)


def look_ahead(config: ClusterConfig, workspace: Workspace, pending: Collection[str]) -> None:
    """See `Steps`."""
    _check_settings(config)
    if config.import_file is not None:
        hash_file(config.import_file)
        return
    require_single(config.backbone.name, "cluster")
    if "backbone.weights" not in pending:
        check_weights(config.backbone, workspace, offline=config.runtime.offline, trained_for="cluster")


def describe(plan: Plan) -> dict[str, Any]:
    """Return the effective settings by name, for people."""
    config, source = plan.config, plan.source
    images = source.images
    shown = {
        "data": f"{images.root} ({images.format}, split {images.split}, {len(images)} images)",
        "proposals": f"{plan.proposals_name} ({source.store.total:,} in {len(source.places):,} images)",
    }
    if config.import_file is not None:
        shown["clusters"] = f"import of {config.import_file}"
        if plan.given is not None:
            shown["k"] = f"{len(plan.given.categories)}, the categories of the file by id"
        return shown | {"output": str(plan.output.folder)}
    num_bytes = plan.num_rows * (2 * plan.num_channels + 4 * config.pca_dim)
    return shown | {
        "backbone": f"{config.backbone.name}, weights {plan.weights.origin}",
        "features": f"{config.level}, {plan.num_channels} channels, RoIAlign averaged over the box",
        "resolution": f"short side {config.short_side}, long side at most {config.long_side}",
        "batch_size": f"{config.batch_size} images per process",
        "pca_dim": f"{config.pca_dim}, fitted on {kmeans.num_pca_rows(plan.num_rows, config):,} proposals",
        "k": f"{config.k}, {config.kmeans_epochs} epochs of mini-batch k-means",
        "seed": config.seed,
        "disk": f"{num_bytes / 1e9:.2f} GB while it runs",
        "output": str(plan.output.folder),
    }


def run(plan: Plan, process: Process) -> None:
    """Extract features on every process, then cluster on the main process; or write clusters from a file.

    Raises:
        Preempted: stopped by a signal; the same command continues.
        RunError: there is no room on disk, or features are not finite.
    """
    if plan.config.import_file is not None:
        if process.is_main:
            _write_import(plan)
        return
    resume = plan.output.partial / "resume"
    features = RowFile(resume / "features.f16", "<f2", plan.num_rows, plan.num_channels)
    marks = DoneMarks(resume / "features.done", plan.source.num_batches)
    if process.is_main:
        plan.output.begin(plan.config)
        resume.mkdir(exist_ok=True)
        if not marks.path.exists():
            features.create()
            marks.create()
    wait_for_all(process)
    with stop_on_signal() as stop:
        _extract(plan, process, features, marks, stop)
        wait_for_all(process)
        if process.is_main:
            _write_clusters(plan, *_cluster(plan, process, features, stop))


def _check_settings(config: ClusterConfig) -> None:
    """Refuse settings that cannot take effect."""
    for setting in ("frozen_stages", "norm_eval", "drop_path"):
        if getattr(config.backbone, setting) != "auto":
            raise ConfigError(f"backbone.{setting}: no effect here, nothing is trained; leave it out")
    if config.import_file is None:
        return
    of_making = set(ClusterConfig.model_fields) - set(StageConfig.model_fields) - {"proposals", "import_file"}
    idle = sorted(config.model_fields_set & of_making)
    if idle:
        raise ConfigError(f"{', '.join(idle)}: no effect with --import, which takes clusters as they are: leave it out")


def _extract(plan: Plan, process: Process, features: RowFile, marks: DoneMarks, stop: StopSignal) -> None:
    if marks.read()[process.rank :: process.world_size].all():
        return
    batches = range(process.rank, plan.source.num_batches, process.world_size)
    num_images = sum(len(plan.source.batch(index)) for index in batches)
    backbone = _load_backbone(plan, process)
    with Progress("cluster: features", num_images, "images", mode=process.progress) as progress:
        write_features(backbone, plan.source, features, marks, plan.config, process, Watch(progress, stop))


def _load_backbone(plan: Plan, process: Process) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.config.seed)  # an untrained backbone must be the same after a restart
        backbone = build_backbone(plan.config.backbone)
    load_backbone_weights(backbone, plan.weights.file)
    backbone.eval().requires_grad_(False)
    place(backbone, process)
    return backbone


def _cluster(
    plan: Plan, process: Process, features: RowFile, stop: StopSignal
) -> tuple[kmeans.Clustering, kmeans.Projection]:
    config, num_rows, folder = plan.config, plan.num_rows, features.path.parent
    projected = RowFile(folder / "projected.f32", "<f4", num_rows, config.pca_dim)

    @contextlib.contextmanager
    def watched(title: str, total: int) -> Iterator[Watch]:
        with Progress(f"cluster: {title}", total, "proposals", mode=process.progress) as progress:
            yield Watch(progress, stop)

    with watched("PCA", kmeans.num_pca_rows(num_rows, config)) as watch:
        projection = kmeans.fit_pca(features, config, folder, watch)
    with watched("projection", num_rows) as watch:
        kmeans.project(features, projection, projected, config, watch)
    with watched("k-means", num_rows * config.kmeans_epochs) as watch:
        centroids = kmeans.fit_kmeans(projected, config, folder, watch)
    with watched("assignment", num_rows) as watch:
        return kmeans.assign(projected, centroids, config, watch), projection


def _write_clusters(plan: Plan, clustering: kmeans.Clustering, projection: kmeans.Projection) -> None:
    """Write the artifact for clusters that were made, and log the result."""
    folder = plan.output.partial
    save_array(folder / "centroids.npy", clustering.centroids)
    save_arrays(folder / "pca.npz", vars(projection))
    report = build_report(clustering, projection, len(plan.source.places))
    problems = find_problems(report)
    figures = (
        f"clusters, inertia {report['inertia']:.4g} ({report['inertia_per_proposal']:.4g} per proposal); clusters "
        f"explain {report['explained_by_clusters']:.1%} of the variance, the PCA keeps "
        f"{report['explained_by_pca']:.1%}; {len(report['dead_clusters'])} dead"
    )
    _write(plan, clustering, {**report, "warnings": problems}, figures)
    for problem in problems:
        logger.warning(f"cluster: {problem}")
    kept = ("num_proposals", "k", "pca_dim", "inertia", "inertia_per_proposal", "explained_by_pca")
    result = {name: report[name] for name in (*kept, "explained_by_clusters", "effective_clusters")}
    result |= {"dead_clusters": len(report["dead_clusters"]), "warnings": problems}
    plan.output.complete(result, content=("labels.npy", "centroids.npy"))


def _write_import(plan: Plan) -> None:
    """Write the artifact for clusters from a file, and log the result."""
    given, folder = plan.given, plan.output.partial
    assert given is not None, "a finished run is not run again"
    plan.output.begin(plan.config)
    members = kmeans.Members(given.labels, np.zeros(len(given.labels), np.float32), len(given.categories))
    names = [category.name for category in given.categories]
    categories = [
        {"cluster_id": index, "category_id": category.category_id, "name": category.name}
        for index, category in enumerate(given.categories)
    ]
    write_json(folder / "categories.json", categories)
    report = build_size_report(members, len(plan.source.places))
    for entry, category in zip(report["clusters"], categories, strict=True):
        entry.update(category)
    if names != [f"cluster_{number}" for number in range(1, members.k + 1)]:  # the authors' names
        logger.warning(
            f"cluster: the categories are not cluster_1 to cluster_{members.k}: clusters are numbered by category id, "
            f"from {names[0]} to {names[-1]}; {plan.output.folder / 'categories.json'} lists them"
        )
    if given.num_unused:
        logger.warning(f"cluster: {given.num_unused:,} boxes of the file are none of the proposals and are left out")
    unused = {"num_unused_boxes": given.num_unused}
    _write(plan, members, report | unused, f"clusters of {plan.config.import_file}")
    result = {name: report[name] for name in ("num_proposals", "k", "effective_clusters")}
    result |= {"dead_clusters": len(report["dead_clusters"]), **unused}
    plan.output.complete(result, content=("labels.npy", "categories.json"))


def _write(plan: Plan, members: kmeans.Members, report: dict[str, Any], figures: str) -> None:
    """Write labels, report and pictures, and log the report."""
    folder = plan.output.partial
    dtype = np.int16 if members.k <= np.iinfo(np.int16).max + 1 else np.int32
    save_array(folder / "labels.npy", members.labels.astype(dtype))
    write_json(folder / "report.json", report)
    with never_failing(folder / "sheet.jpg"):
        draw_cluster_sheet(folder / "sheet.jpg", plan.source, members)
    with never_failing(folder / "plots" / "sizes.png"):
        draw_sizes(folder / "plots" / "sizes.png", members)
    logger.info(f"cluster: {report['num_proposals']:,} proposals in {report['k']} {figures}")
    for line in histogram_lines(report["size_histogram"]):
        logger.info(line)


STEPS = Steps[ClusterConfig, Plan](ClusterConfig, prepare, describe, run, look_ahead=look_ahead)

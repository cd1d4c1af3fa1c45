"""Numbers of a review: verdicts by label, score and version, people and their time. Only reads."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, text

from db.publishing import LsProject
from db.states import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """How many masks of one model version, label and score band got one verdict.

    band: 0..19, each a twentieth of the score range 0..1; None for added masks. relabelled: edited masks with another
    label, or with a second one on the same pixels. measured, iou_sum: over the edited masks whose correction could be
    read.
    """

    model_version: str | None
    label: str
    band: int | None
    verdict: Verdict
    masks: int
    relabelled: int
    measured: int
    iou_sum: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AssetCounts:
    """What became of the assets that a project has of a job.

    published = untouched + corrected + elsewhere + skipped + waiting. elsewhere: annotated, but the annotation did not
    start from the job's own prediction. skipped: everyone who opened it skipped it.
    """

    published: int
    untouched: int
    corrected: int
    elsewhere: int
    skipped: int
    waiting: int
    several_annotators: int
    unreadable_regions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotator:
    """What one person did. Label Studio's page measured the seconds.

    seconds_total: over all annotations, skipped ones too. seconds_median: over the submitted ones.
    """

    annotator: int | None
    submitted: int
    skipped: int
    seconds_total: float
    seconds_median: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reviewed:
    """The chosen annotation of an asset.

    agreement: mean over its masks, 0..1. A kept mask counts 1, an edited one its IoU, any other 0.
    """

    asset_id: int
    key: str
    size_hw: tuple[int, int]
    task_id: int | None
    agreement: float
    kept: int
    edited: int
    deleted: int
    added: int


# The assets of a job that a project has, each with its task, and with the asset that owns the shown masks. It begins
# with the predictions, because far fewer assets are published than listed.
MINE = """mine AS (
    SELECT my.id, my.key, t.id AS ls_task_id, t.task_id, p.asset_id, p.model_version
    FROM job wanted
    JOIN job same ON same.source = wanted.source AND same.model_version = wanted.model_version
    JOIN ls_prediction p ON p.job_id = same.id AND p.model_version = wanted.model_version AND p.state = 'done'
    JOIN ls_task t ON t.id = p.ls_task_id
    JOIN asset a ON a.id = p.asset_id
    JOIN asset my ON my.job_id = wanted.id AND my.key = a.key
    WHERE wanted.id = :job_id AND t.server = :server AND t.project_id = :project_id)"""

# The score that Label Studio showed. SAM's estimate may exceed 1, and some models give NaN.
_SCORE = "CASE WHEN m.predicted_iou = 'NaN' THEN 0 ELSE round(greatest(0, least(1, m.predicted_iou))::numeric, 4) END"


def tallies(db: Connection, *, job_id: int, ls_project: LsProject) -> list[Tally]:
    """Count the masks of the chosen annotations of a job's assets, from any model version.

    An added mask counts under the person's label, the others under the model's.
    """
    rows = db.execute(
        text(
            f"""WITH {MINE}
                SELECT n.model_version, CASE WHEN r.verdict = 'added' THEN r.label ELSE coalesce(m.label, 'object') END
                           AS label,
                       CASE WHEN m.n IS NOT NULL THEN least(19, floor({_SCORE} * 20))::int END AS band,
                       r.verdict, count(*) AS masks,
                       count(*) FILTER (WHERE r.verdict = 'edited' AND (r.label <> coalesce(m.label, 'object')
                                                                        OR r.iou = 1 AND r.counts IS NULL))
                           AS relabelled,
                       count(r.iou) AS measured, coalesce(sum(r.iou), 0)::float AS iou_sum
                FROM mine JOIN ls_annotation n ON n.ls_task_id = mine.ls_task_id AND n.standing = 'chosen'
                JOIN ls_region r ON r.ls_annotation_id = n.id
                LEFT JOIN mask m ON m.asset_id = n.asset_id AND m.n = r.mask_n
                GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4"""
        ),
        {"job_id": job_id, **ls_project.values()},
    ).mappings()
    return [Tally(**{**row, "verdict": Verdict(row["verdict"])}) for row in rows]


def kept_by_score(db: Connection, *, job_id: int, ls_project: LsProject) -> list[tuple[float, int, int]]:
    """Rows (score, masks kept unchanged, masks) over a job's judged predictions: one row a score, highest first."""
    rows = db.execute(
        text(
            f"""WITH {MINE}
                SELECT ({_SCORE})::float AS score, count(*) FILTER (WHERE r.verdict = 'kept') AS kept, count(*) AS n
                FROM mine JOIN ls_annotation n ON n.ls_task_id = mine.ls_task_id AND n.standing = 'chosen'
                     AND n.model_version = mine.model_version
                JOIN ls_region r ON r.ls_annotation_id = n.id
                JOIN mask m ON m.asset_id = n.asset_id AND m.n = r.mask_n
                GROUP BY 1 ORDER BY 1 DESC"""
        ),
        {"job_id": job_id, **ls_project.values()},
    )
    return [(row.score, row.kept, row.n) for row in rows]


def asset_counts(db: Connection, *, job_id: int, ls_project: LsProject) -> AssetCounts:
    """What became of the assets that the project has of a job."""
    row = (
        db.execute(
            text(
                f"""WITH {MINE}, one AS (
                        SELECT n.id IS NOT NULL AS annotated, n.model_version = mine.model_version AS ours,
                               NOT EXISTS (SELECT 1 FROM ls_region r
                                           WHERE r.ls_annotation_id = n.id AND r.verdict <> 'kept')
                                   AND coalesce(n.unread, 0) = 0 AS untouched,
                               EXISTS (SELECT 1 FROM ls_annotation s WHERE s.ls_task_id = mine.ls_task_id
                                       AND s.standing = 'skipped') AS skipped,
                               EXISTS (SELECT 1 FROM ls_annotation s WHERE s.ls_task_id = mine.ls_task_id
                                       AND s.standing = 'other') AS several,
                               coalesce(n.unread, 0) AS unread
                        FROM mine LEFT JOIN ls_annotation n
                             ON n.ls_task_id = mine.ls_task_id AND n.standing = 'chosen')
                    SELECT count(*) AS published,
                           count(*) FILTER (WHERE annotated AND ours AND untouched) AS untouched,
                           count(*) FILTER (WHERE annotated AND ours AND NOT untouched) AS corrected,
                           count(*) FILTER (WHERE annotated AND ours IS NOT TRUE) AS elsewhere,
                           count(*) FILTER (WHERE NOT annotated AND skipped) AS skipped,
                           count(*) FILTER (WHERE NOT annotated AND NOT skipped) AS waiting,
                           count(*) FILTER (WHERE several) AS several_annotators,
                           coalesce(sum(unread), 0)::int AS unreadable_regions
                    FROM one"""
            ),
            {"job_id": job_id, **ls_project.values()},
        )
        .mappings()
        .one()
    )
    return AssetCounts(**row)


def annotators(db: Connection, *, job_id: int, ls_project: LsProject) -> list[Annotator]:
    """Who did what on a job's assets. A resubmitted annotation counts again, because it took time again."""
    rows = db.execute(
        text(
            f"""WITH {MINE}
                SELECT n.annotator, count(*) FILTER (WHERE n.standing <> 'skipped') AS submitted,
                       count(*) FILTER (WHERE n.standing = 'skipped') AS skipped,
                       coalesce(sum(n.lead_seconds), 0)::float AS seconds_total,
                       percentile_cont(0.5) WITHIN GROUP (ORDER BY n.lead_seconds)
                           FILTER (WHERE n.standing <> 'skipped') AS seconds_median
                FROM mine JOIN ls_annotation n ON n.ls_task_id = mine.ls_task_id
                GROUP BY n.annotator ORDER BY n.annotator"""
        ),
        {"job_id": job_id, **ls_project.values()},
    ).mappings()
    return [Annotator(**row) for row in rows]


def lead_seconds(
    db: Connection, *, job_id: int, ls_project: LsProject
) -> tuple[int, float, float | None, float | None]:
    """(count, sum, mean, median) of the tasks' times in seconds, over the submitted tasks whose time is known.

    A task's time is the sum over all people, resubmissions too.
    """
    row = db.execute(
        text(
            f"""WITH {MINE}, took AS (
                    SELECT sum(n.lead_seconds) AS seconds FROM mine
                    JOIN ls_annotation n ON n.ls_task_id = mine.ls_task_id AND n.standing <> 'skipped'
                    GROUP BY mine.id)
                SELECT count(seconds), coalesce(sum(seconds), 0)::float, avg(seconds)::float,
                       percentile_cont(0.5) WITHIN GROUP (ORDER BY seconds) FROM took"""
        ),
        {"job_id": job_id, **ls_project.values()},
    ).one()
    return row[0], row[1], row[2], row[3]


def worst_assets(db: Connection, *, job_id: int, ls_project: LsProject, limit: int) -> list[Reviewed]:
    """The corrected assets of a job, those that agree least with the prediction first."""
    rows = db.execute(
        text(
            f"""WITH {MINE}
                SELECT mine.id AS asset_id, mine.key, mine.task_id, max(o.height) AS height, max(o.width) AS width,
                       (sum(CASE r.verdict WHEN 'kept' THEN 1 WHEN 'edited' THEN coalesce(r.iou, 0) ELSE 0 END)
                        / count(*))::float AS agreement,
                       count(*) FILTER (WHERE r.verdict = 'kept') AS kept,
                       count(*) FILTER (WHERE r.verdict = 'edited') AS edited,
                       count(*) FILTER (WHERE r.verdict = 'deleted') AS deleted,
                       count(*) FILTER (WHERE r.verdict = 'added') AS added
                FROM mine JOIN ls_annotation n ON n.ls_task_id = mine.ls_task_id AND n.standing = 'chosen'
                     AND n.model_version = mine.model_version
                JOIN ls_region r ON r.ls_annotation_id = n.id
                JOIN outcome o ON o.asset_id = mine.asset_id
                GROUP BY mine.id, mine.key, mine.task_id HAVING bool_or(r.verdict <> 'kept')
                ORDER BY agreement, mine.id LIMIT :limit"""
        ),
        {"job_id": job_id, **ls_project.values(), "limit": limit},
    ).mappings()
    names = ("asset_id", "key", "task_id", "agreement", "kept", "edited", "deleted", "added")
    return [Reviewed(size_hw=(row["height"], row["width"]), **{name: row[name] for name in names}) for row in rows]

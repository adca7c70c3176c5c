"""What the database knows for Prometheus: jobs by state, how long profiles take, how well predictions hold."""

from __future__ import annotations

import math

from sqlalchemy import func, select
from sqlalchemy.orm import aliased

from api.observability.logging_setup import Metrics
from api.storage.database import Database, EvaluationRow, JobEventRow, JobRow

MOST_ROWS = 200


def observe_database(metrics: Metrics, database: Database) -> None:
    """Set the gauges that every process of an installation sees alike."""
    with database.transaction() as session:
        counts = session.execute(
            select(JobRow.kind, JobRow.state, func.count()).group_by(JobRow.kind, JobRow.state)
        ).all()
        started, ended = aliased(JobEventRow), aliased(JobEventRow)
        times = session.execute(
            select(started.created_at, ended.created_at)
            .join(ended, ended.job_id == started.job_id)
            .join(JobRow, JobRow.id == started.job_id)
            .where(JobRow.kind == "profile", started.kind == "running", ended.kind == "done")
            .order_by(ended.created_at.desc())
            .limit(MOST_ROWS)
        ).all()
        pairs = session.execute(
            select(EvaluationRow.predicted_kl, EvaluationRow.measured_kl)
            .where(EvaluationRow.predicted_kl > 0, EvaluationRow.measured_kl > 0)
            .order_by(EvaluationRow.created_at.desc())
            .limit(MOST_ROWS)
        ).all()
    metrics.jobs.clear()
    for kind, state, count in counts:
        metrics.jobs.labels(kind, state).set(count)
    metrics.queue_depth.set(sum(count for _, state, count in counts if state == "queued"))
    if times:
        metrics.profile_seconds.set(sum((end - start).total_seconds() for start, end in times) / len(times))
    logarithms = [math.log(predicted / measured) for predicted, measured in pairs if predicted]
    if logarithms:
        metrics.prediction_ratio.set(math.exp(sum(logarithms) / len(logarithms)))

"""The service's parts, opened once per process and closed at its end. Routes reach them through `ServiceOf`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from api.catalogue import Catalogue
from api.database import Database, open_database
from api.jobs import Jobs
from api.keys import KeyStore
from api.limits import Places
from api.observability import Metrics
from api.plan_store import PlanStore
from api.profile_store import ProfileStore
from api.settings import Settings


@dataclass(frozen=True)
class Service:
    """Everything a route needs."""

    settings: Settings
    database: Database
    catalogue: Catalogue
    profiles: ProfileStore
    plans: PlanStore
    keys: KeyStore
    metrics: Metrics
    jobs: Jobs
    event_streams: Places

    @classmethod
    def open(cls, settings: Settings) -> Service:
        """Everything but the job engine, which `jobs.launch` starts. Raises `DatabaseError`."""
        database = open_database(settings)
        return cls(
            settings=settings,
            database=database,
            catalogue=Catalogue(settings),
            profiles=ProfileStore(settings, database),
            plans=PlanStore(settings, database),
            keys=KeyStore(database),
            metrics=Metrics(),
            jobs=Jobs(settings, database),
            event_streams=Places(settings.max_event_streams, settings.event_streams_per_key),
        )

    def close(self) -> None:
        self.jobs.close()
        self.database.close()


async def _service(request: Request) -> Service:
    found: Service = request.app.state.service
    return found


ServiceOf = Annotated[Service, Depends(_service)]

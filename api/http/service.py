"""The service's parts, opened once per process and closed at its end. Routes reach them through `ServiceOf`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from api.http.middleware.limits import Places
from api.jobs.client import Jobs
from api.observability.logging_setup import Metrics
from api.settings import Settings
from api.storage.api_keys import KeyStore
from api.storage.database import Database, open_database
from api.storage.models import Catalogue
from api.storage.plans import PlanStore
from api.storage.profiles import ProfileStore


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

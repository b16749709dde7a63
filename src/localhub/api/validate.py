"""The check of a model card's metadata that clients ask for before they upload a README."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from localhub.api.access import JsonBody, text
from localhub.card_rules import check_card

router = APIRouter()


@router.post("/api/validate-yaml")
def validate(body: JsonBody) -> JSONResponse:
    report = check_card(text(body, "content"), text(body, "repoType", "model"))
    shown: dict[str, Any] = {
        "errors": [{"message": message} for message in report.errors],
        "warnings": [{"message": message} for message in report.warnings],
    }
    return JSONResponse(shown, status_code=400 if report.errors else 200)

"""The HTTP interface described for programs: OpenAPI 3.1."""

from typing import Any

from reslab import __version__

PROBLEMS = {
    400: "The request is broken, or a parameter is wrong.",
    401: "The token is missing or wrong.",
    404: "There is nothing here.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is of another type than an image.",
    421: "The server answers to localhost only.",
    422: "There are too many images or parts, or none, or one is not readable; `images` says which and why.",
    503: "The server has as much to do as it takes on, or is stopping.",
    504: "There was no answer within the time limit.",
}
STRING, NUMBER, FLAG = {"type": "string"}, {"type": "number"}, {"type": "boolean"}
SHARE = {"type": "number", "minimum": 0, "maximum": 1}


def describe(most_bytes: int, most_images: int, *, report: bool) -> dict[str, Any]:
    """The document for a server with these limits."""
    paths: dict[str, Any] = {
        "/predict": {"post": _predict(most_bytes, most_images)},
        "/model": {
            "get": _get("What the model is: net, classes, limits, and how good it was on its test images.", _json({"$ref": "#/components/schemas/Model"}))
        },
        "/ready": {"get": _get("Whether requests are taken.", _json(_object({"status": STRING})), 503)},
        "/health": {"get": _get("The process lives.", _json(_object({"status": STRING})))},
        "/metrics": {"get": _get("Counts and times, as Prometheus reads them.", {"text/plain": {"schema": STRING}})},
        "/openapi.json": {"get": _get("This document.", _json({"type": "object"}))},
        "/": {"get": _get("The page, for people.", {"text/html": {"schema": STRING}})},
    }
    if report:
        paths["/report"] = {"get": _get("The report of the training.", {"text/html": {"schema": STRING}})}
    return {
        "openapi": "3.1.0",
        "info": {"title": "reslab serve", "version": __version__, "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "responses": {str(status): _problem(text, status) for status, text in PROBLEMS.items()},
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}, "basic": {"type": "http", "scheme": "basic"}},
        },
        "security": [{}, {"bearer": []}, {"basic": []}],
    }


def _predict(most_bytes: int, most_images: int) -> dict[str, Any]:
    file = {"type": "string", "format": "binary"}
    binary = {"schema": {"type": "string", "format": "binary", "maxLength": most_bytes}}
    form = _object({"image": {"type": "array", "items": file, "minItems": 1, "maxItems": most_images}})
    heat = {
        "name": "heat_map",
        "in": "query",
        "schema": {**FLAG, "default": False},
        "description": "Also draw where the class was seen.",
    }
    return {
        "operationId": "predict",
        "summary": "Classify images",
        "description": "A raw image, or multipart/form-data with a file part for each of several.",
        "parameters": [heat],
        "requestBody": {
            "required": True,
            "content": {
                "image/*": binary,
                "application/octet-stream": binary,
                "multipart/form-data": {"schema": form, "encoding": {"image": {"contentType": "image/png, image/jpeg"}}},
            },
        },
        "responses": {
            "200": {"description": "The classes, in the order of the images.", "content": _json({"$ref": "#/components/schemas/Predictions"})},
            **_refused(400, 401, 408, 413, 415, 421, 422, 503, 504),
        },
    }


def _schemas() -> dict[str, Any]:
    ranked = _object({"label": STRING, "probability": SHARE})
    prediction = _object(
        {
            "name": {"type": ["string", "null"], "description": "The file name it came with."},
            "label": STRING,
            "probability": {**SHARE, "description": "Calibrated."},
            "sure": {**FLAG, "description": "Whether the probability reaches `sure_from`."},
            "top": {"type": "array", "items": ranked, "maxItems": 5, "description": "The likeliest classes."},
        },
        heat_map={**STRING, "description": "data: URL of a grey PNG of the pixels that the net saw: the brighter, the more they spoke for `label`."},
    )
    problem = _object({"type": STRING, "title": STRING, "status": {"type": "integer"}, "detail": STRING}, images={"type": "array"})
    model = _object(
        {"classes": {"type": "array", "items": STRING}, "sure_from": SHARE, "temperature": NUMBER, "image_size": {"type": "integer"}, "heat_map": FLAG}
    )
    return {
        "Predictions": _object({"predictions": {"type": "array", "items": prediction}, "sure_from": SHARE}),
        "Problem": {**problem, "description": "RFC 9457."},
        "Model": model,
    }


def _object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {**required, **optional}, "required": list(required)}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _get(summary: str, content: dict[str, Any], *refused: int) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": {"description": "As said.", "content": content}, **_refused(400, 401, 421, *refused)}}


def _refused(*statuses: int) -> dict[str, Any]:
    return {str(status): {"$ref": f"#/components/responses/{status}"} for status in statuses}


def _problem(text: str, status: int) -> dict[str, Any]:
    found: dict[str, Any] = {"description": text, "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}}
    if status == 503:
        found["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}}
    if status == 401:
        found["headers"] = {"WWW-Authenticate": {"schema": STRING}}
    return found

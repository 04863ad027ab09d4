"""What one writes in an afternoon: ETSI GS QKD 014 on FastAPI and uvicorn, keys in memory.  A yardstick, not a KME.

No SAE is told from another (uvicorn hands no client certificate on), nothing is on a disk, nothing is agreed with a
second site, and a key is gone when the process is.  ``python plain_014_server.py PORT CA CERTIFICATE KEY``
"""

import base64
import os
import ssl
import sys
import uuid

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel

app = FastAPI(openapi_url=None)
waiting: dict[tuple[str, str], str] = {}


class KeyRequest(BaseModel):
    number: int = 1
    size: int = 256


class KeyID(BaseModel):
    key_ID: str


class KeyIDs(BaseModel):
    key_IDs: list[KeyID]


@app.get("/api/v1/keys/{slave}/status")
async def status(slave: str) -> dict[str, object]:
    return {"slave_SAE_ID": slave, "key_size": 256, "stored_key_count": 1, "max_key_per_request": 128}


@app.post("/api/v1/keys/{slave}/enc_keys")
async def enc_keys(slave: str, asked: KeyRequest) -> JSONResponse:
    keys = []
    for _ in range(asked.number):
        key = {"key_ID": str(uuid.uuid4()), "key": base64.b64encode(os.urandom(asked.size // 8)).decode()}
        waiting[slave, key["key_ID"]] = key["key"]
        keys.append(key)
    return JSONResponse({"keys": keys})


@app.post("/api/v1/keys/{slave}/dec_keys")
async def dec_keys(slave: str, asked: KeyIDs) -> JSONResponse:
    names = [("sae-bob", entry.key_ID) for entry in asked.key_IDs]  # somebody is the slave
    if not all(name in waiting for name in names):
        return JSONResponse({"message": "one or more keys specified are not found on KME"}, 400)
    return JSONResponse({"keys": [{"key_ID": name[1], "key": waiting.pop(name)} for name in names]})


if __name__ == "__main__":
    port, ca, certificate, key = sys.argv[1:]
    uvicorn.run(app, host="127.0.0.1", port=int(port), ssl_ca_certs=ca, ssl_certfile=certificate, ssl_keyfile=key,
                ssl_cert_reqs=ssl.CERT_REQUIRED, log_level="error", access_log=False)  # fmt: skip

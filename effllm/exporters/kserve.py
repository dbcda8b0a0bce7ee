"""What KServe needs to serve a variant by `effllm serve`: the folder as it is, a runtime and a service.

    DIR/service.yaml     a ServingRuntime that runs `effllm serve`, and an InferenceService that asks for it
    DIR/model/           the variant, to be put where the service's `storageUri` says

Requests and answers are those of the Open Inference Protocol, version 2, with texts as BYTES.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path
from string import Template

from effllm.variant import MANIFEST, Variant

RUNTIME = "effllm-serve"
MOUNT = "/mnt/models"
"""Where KServe puts the folder of `storageUri`."""
PORT = 8080
SERVICE = Template(
    """\
# The runtime is written once per namespace; the service once per model. Set the two values marked "yours".
apiVersion: serving.kserve.io/v1alpha1
kind: ServingRuntime
metadata:
  name: $runtime
spec:
  supportedModelFormats:
    - name: effllm
      version: "1"
      autoSelect: true
  protocolVersions:
    - v2
  containers:
    - name: kserve-container
      image: effllm-serve:$version  # yours: built from examples/serving/Dockerfile
      args:
        - serve
        - "{{.Name}}=$mount"
        - --host
        - 0.0.0.0
        - --port
        - "$port"
      ports:
        - containerPort: $port
          protocol: TCP
      resources:
        requests:
          cpu: "1"
          memory: 1Gi
        limits:
          cpu: "2"
          memory: 2Gi
      startupProbe:
        httpGet:
          path: /v2/health/ready
          port: $port
        periodSeconds: 2
        failureThreshold: 60
      readinessProbe:
        httpGet:
          path: /v2/health/ready
          port: $port
        periodSeconds: 5
      livenessProbe:
        httpGet:
          path: /v2/health/live
          port: $port
        periodSeconds: 10
      securityContext:
        runAsNonRoot: true
        readOnlyRootFilesystem: true
        allowPrivilegeEscalation: false
        capabilities:
          drop:
            - ALL
---
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: $name
spec:
  predictor:
    model:
      modelFormat:
        name: effllm
      protocolVersion: v2
      runtime: $runtime
      storageUri: pvc://models/$name  # yours: where the folder model/ is
"""
)


def write_kserve(variant: Variant, name: str, target: Path) -> str:
    """Write the service of a checked ONNX variant into `target`; return the path of its graph there.

    Raises ArtifactError when the copy is not what the variant's manifest says.
    """
    for file in (MANIFEST, *variant.manifest["files"]):
        (target / "model" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(variant.path / file, target / "model" / file)
    Variant.open(target / "model")
    (target / "service.yaml").write_text(service_text(name), encoding="utf-8")
    return f"model/{variant.manifest['model_file']}"


def service_text(name: str) -> str:
    """Return the runtime and the service as YAML. `name` is that of the served model and of the service."""
    version = importlib.metadata.version("effllm")
    return SERVICE.substitute(name=name, version=version, runtime=RUNTIME, mount=MOUNT, port=PORT)

"""The fields of a manifest that launch/gke.sh uses, and no others.

Written down from JobSet's api/jobset/v1alpha2/jobset_types.go (v0.8 and later) and from Kubernetes'
batch/v1 and core/v1 (1.31, where podFailurePolicy is stable). A name with ? may be left out.
"""

import json
from typing import Any

import kubernetes
import yaml

_POD = {
    "metadata": {"annotations": {"gke-gcsfuse/volumes": str}},
    "spec": {
        "restartPolicy": str,
        "terminationGracePeriodSeconds": int,
        "serviceAccountName": str,
        "nodeSelector?": {
            "cloud.google.com/gke-tpu-accelerator?": str,
            "cloud.google.com/gke-tpu-topology?": str,
            "cloud.google.com/gke-spot?": str,
            "cloud.google.com/reservation-name?": str,
        },
        "tolerations?": [{"key": str, "operator": str, "value": str, "effect": str}],
        "containers": [
            {
                "name": str,
                "image": str,
                "command": [str],
                "workingDir?": str,
                "securityContext?": {"runAsUser": int},
                "resources": {
                    "requests": {"google.com/tpu?": str, "cpu?": str, "memory?": str},
                    "limits": {"google.com/tpu?": str, "cpu?": str, "memory?": str},
                },
                "volumeMounts": [{"name": str, "mountPath": str, "readOnly?": bool}],
            }
        ],
        "volumes": [
            {
                "name": str,
                "csi?": {
                    "driver": str,
                    "readOnly": bool,
                    "volumeAttributes": {"bucketName": str, "mountOptions": str},
                },
                "configMap?": {"name": str, "items": [{"key": str, "path": str}]},
            }
        ],
    },
}
_JOB_SET = {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {
        "name": str,
        "labels?": {"kueue.x-k8s.io/queue-name": str},
        "annotations?": {"alpha.jobset.sigs.k8s.io/exclusive-topology": str},
    },
    "spec": {
        "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool},
        "failurePolicy": {
            "maxRestarts": int,
            "restartStrategy": "BlockingRecreate",
            "rules": [{"name": str, "action": "FailJobSet", "onJobFailureReasons": [str]}],
        },
        "replicatedJobs": [
            {
                "name": str,
                "replicas": int,
                "template": {
                    "spec": {
                        "completionMode": "Indexed",
                        "completions": int,
                        "parallelism": int,
                        "backoffLimit": int,
                        "podFailurePolicy": {
                            "rules": [
                                {
                                    "action": "FailJob",
                                    "onExitCodes": {
                                        "containerName": str,
                                        "operator": "In",
                                        "values": [int],
                                    },
                                }
                            ]
                        },
                        "template": _POD,
                    }
                },
            }
        ],
    },
}
_CONFIG_MAP = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": str}, "data": dict}


def _check(value: Any, schema: Any, where: str) -> None:
    if isinstance(schema, dict):
        fields = {name.rstrip("?"): (name, inner) for name, inner in schema.items()}
        assert isinstance(value, dict) and not value.keys() - fields.keys(), where
        for name, (marked, inner) in fields.items():
            if name in value:
                _check(value[name], inner, f"{where}.{name}")
            else:
                assert marked.endswith("?"), f"{where}.{name} is missing"
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, where
        for item in value:
            _check(item, schema[0], f"{where}[]")
    elif isinstance(schema, str):
        assert value == schema, where
    else:
        assert type(value) is schema, f"{where} is {value!r}"


def read(text: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The JobSet and the ConfigMap, if there is one, of a manifest that is as it has to be."""
    *maps, job_set = yaml.safe_load_all(text)
    _check(job_set, _JOB_SET, "JobSet")
    for config_map in maps:
        _check(config_map, _CONFIG_MAP, "ConfigMap")
    client = kubernetes.client.ApiClient()
    for job in job_set["spec"]["replicatedJobs"]:
        model = client.deserialize(
            json.dumps(job["template"]), "V1JobTemplateSpec", "application/json"
        )
        assert client.sanitize_for_serialization(model) == job["template"]
    return job_set, maps[0] if maps else None

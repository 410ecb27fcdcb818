"""The fields of a JobSet (jobset.x-k8s.io/v1alpha2) and of the Job and Pod in it, as far as documented and of use here,
and a check against them: the API server drops what it does not know without a word, so that a typo does nothing."""

import re
from typing import Any

NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
STRINGS = {str: str}
STATUS = {"True", "False", "Unknown"}
CONTAINER = {
    "name!": NAME, "image!": str, "command": [str], "args": [str], "workingDir": str,
    "env": [{"name!": re.compile(r"[A-Za-z_][A-Za-z0-9_]*"), "value": str}],
    "ports": [{"containerPort!": int, "name": str, "protocol": {"TCP", "UDP", "SCTP"}}],
    "resources": {"limits": {str: (int, str)}, "requests": {str: (int, str)}},
    "securityContext": {"privileged": bool, "capabilities": {"add": [str]}},
    "volumeMounts": [{"name!": NAME, "mountPath!": str, "readOnly": bool}],
    "imagePullPolicy": {"Always", "IfNotPresent", "Never"},
}  # fmt: skip
EFFECTS = {"NoSchedule", "NoExecute", "PreferNoSchedule"}
TOLERATION = {"key": str, "operator": {"Exists", "Equal"}, "value": str, "effect": EFFECTS}
POD = {
    "containers!": [CONTAINER], "initContainers": [CONTAINER], "restartPolicy": {"Never", "OnFailure"},
    "nodeSelector": STRINGS, "tolerations": [TOLERATION], "terminationGracePeriodSeconds": int,
    "serviceAccountName": str, "hostNetwork": bool, "dnsPolicy": str, "priorityClassName": str, "subdomain": str,
    "volumes": [{"name!": NAME, "emptyDir": {"medium": {"", "Memory"}, "sizeLimit": str}, "hostPath": {"path!": str}}],
}  # fmt: skip
POD_RULE = {
    "action!": {"FailJob", "Ignore", "Count", "FailIndex"},
    "onExitCodes": {"containerName": str, "operator!": {"In", "NotIn"}, "values!": [int]},
    "onPodConditions": [{"type!": str, "status": STATUS}],
}
METADATA = {"name": NAME, "namespace": NAME, "labels": STRINGS, "annotations": STRINGS}
JOB = {
    "parallelism": int, "completions": int, "completionMode": {"Indexed", "NonIndexed"}, "backoffLimit": int,
    "activeDeadlineSeconds": int, "suspend": bool, "ttlSecondsAfterFinished": int,
    "podFailurePolicy": {"rules!": [POD_RULE]}, "template!": {"metadata": METADATA, "spec!": POD},
}  # fmt: skip
REASONS = {"PodFailurePolicy", "BackoffLimitExceeded", "DeadlineExceeded", "MaxFailedIndexesExceeded", "FailedIndexes"}
JOBSET_RULE = {
    "name!": re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?"),
    "action!": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"},
    "onJobFailureReasons": [REASONS], "onJobFailureMessagePatterns": [str], "targetReplicatedJobs": [str],
}  # fmt: skip
JOBSET = {
    "apiVersion!": {"jobset.x-k8s.io/v1alpha2"},
    "kind!": {"JobSet"},
    "metadata!": METADATA | {"name!": NAME},
    "spec!": {
        "replicatedJobs!": [
            {"name!": NAME, "groupName": str, "replicas": int, "template!": {"metadata": METADATA, "spec!": JOB}}
        ],
        "failurePolicy": {
            "maxRestarts": int, "restartStrategy": {"Recreate", "BlockingRecreate"}, "rules": [JOBSET_RULE],
        },
        "successPolicy": {"operator!": {"All", "Any"}, "targetReplicatedJobs": [str]},
        "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
        "coordinator": {"replicatedJob!": str, "jobIndex": int, "podIndex": int},
        "suspend": bool, "ttlSecondsAfterFinished": int, "managedBy": str,
    },
}  # fmt: skip


def faults(value: Any, schema: Any = JOBSET, path: str = "") -> list[str]:
    """What of a manifest the schema does not know: a "!" behind a name says that the field must be there."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{path}: is no mapping"]
        if str in schema:
            return [fault for name, item in value.items() for fault in faults(item, schema[str], f"{path}.{name}")]
        fields = {name.rstrip("!"): (kind, name.endswith("!")) for name, kind in schema.items()}
        found = [f"{path}.{name}: is missing" for name, (_, needed) in fields.items() if needed and name not in value]
        for name, item in value.items():
            known = name in fields
            found += faults(item, fields[name][0], f"{path}.{name}") if known else [f"{path}.{name}: is not known"]
        return found
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{path}: is no list"]
        return [fault for k, item in enumerate(value) for fault in faults(item, schema[0], f"{path}[{k}]")]
    if isinstance(schema, set):
        right = value in schema
    elif isinstance(schema, re.Pattern):
        right = isinstance(value, str) and schema.fullmatch(value) is not None
    else:
        right = isinstance(value, schema) and (schema is bool or not isinstance(value, bool))
    return [] if right else [f"{path}: {value!r} is not of {schema}"]

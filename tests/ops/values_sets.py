"""Values as users would give them: each set is linted, rendered and validated."""

from __future__ import annotations

from typing import Any

BUCKETS: dict[str, Any] = {
    "trafficLog": {"type": "url", "url": "s3://bucket/traffic"},
    "registry": {"type": "url", "url": "s3://bucket/drafts"},
}

VALUES: dict[str, dict[str, Any]] = {
    "default": {},
    "another model, many settings": {
        "server": {
            "config": {
                "model": {"target": "Qwen/Qwen3-1.7B", "draft": "Qwen/Qwen3-0.6B", "dtype": "bfloat16"},
                "engine": {"max_running_requests": 64, "max_batch_tokens": 4096, "prefix_cache": False},
                "speculation": {"num_speculative_tokens": 6, "adaptive": True},
                "traffic_log": {"roll_bytes": 268435456, "sample_rate": 0.25, "retention_days": "null"},
                "limits": {"request_timeout_s": 120.5},
                "tracing": {"endpoint": "http://collector:4318/v1/traces", "sample_ratio": 0.1},
            }
        },
        "huggingFace": {"existingSecret": "hub"},
    },
    "replicas": {"server": {"replicas": 3, "resources": {"limits": {"cpu": "4", "memory": "8Gi"}}}},
    "GPU, scarce": {
        "server": {
            "replicas": 2,
            "gpu": {"count": 1},
            "runtimeClassName": "nvidia",
            "strategy": {"type": "Recreate"},
            "nodeSelector": {"accelerator": "h100"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "affinity": {"podAntiAffinity": {}},
            "priorityClassName": "serving",
        }
    },
    "autoscaling": {"autoscaling": {"enabled": True, "minReplicas": 2, "maxReplicas": 8, "targetRequestsWaiting": 2}},
    "TLS": {"tls": {"existingSecret": "cert"}},
    "API keys": {
        "auth": {"existingSecret": "keys", "key": "redraft-keys.yaml"},
        "tls": {"existingSecret": "cert"},
        "test": {"apiKeySecret": "key"},
    },
    "mutual TLS": {"tls": {"existingSecret": "cert", "clientAuth": True, "testClientSecret": "client"}},
    "CronJob on object storage": {
        "storage": BUCKETS,
        "objectStore": {"existingSecret": "s3", "endpointUrl": "https://s3.example:9000", "region": "us-west-2"},
        "retraining": {
            "cron": {"enabled": True, "schedule": "*/30 * * * *", "timeZone": "Europe/Zurich"},
            "args": ["--set", "distill.epochs=2"],
            "gpu": {"count": 1},
            "resources": {"requests": {"cpu": "2"}, "limits": {"cpu": "4", "memory": "16Gi"}},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        },
        "serviceAccount": {"trainerAnnotations": {"example.com/role": "trainer"}},
    },
    "trainer loop on new claims": {
        "storage": {
            "modelCache": {"type": "newClaim", "storageClassName": "fast", "accessModes": ["ReadWriteMany"]},
            "trafficLog": {"type": "newClaim", "size": "100Gi"},
            "registry": {"type": "newClaim"},
            "work": {"type": "newClaim"},
        },
        "retraining": {"loop": {"enabled": True}},
    },
    "run now on existing claims": {
        "storage": {
            "modelCache": {"type": "existingClaim", "existingClaim": "models"},
            "trafficLog": {"type": "existingClaim", "existingClaim": "traffic"},
            "registry": {"type": "existingClaim", "existingClaim": "drafts"},
            "work": {"type": "emptyDir", "size": ""},
        },
        "retraining": {"runNow": "after-fix-7"},
    },
    "retention on object storage": {
        "storage": BUCKETS,
        "objectStore": {"existingSecret": "s3", "region": "eu-central-1"},
        "huggingFace": {"existingSecret": "hub"},
        "retention": {
            "enabled": True,
            "days": 7.5,
            "schedule": "0 2 * * *",
            "resources": {"limits": {"memory": "1Gi"}},
            "nodeSelector": {"pool": "batch"},
            "tolerations": [{"key": "batch", "operator": "Exists"}],
            "priorityClassName": "batch",
            "podAnnotations": {"example.com/a": "b"},
            "extraEnv": {"HTTPS_PROXY": "http://proxy:3128"},
        },
        "server": {
            "config": {
                "traffic_log": {
                    "redact": ["email", "card"],
                    "redact_patterns": ["(?i)project <x>, \\d{2,4}"],
                    "exclude_tenants": ["acme", ""],
                }
            }
        },
        "networkPolicy": {"enabled": True},
    },
    "retention on a claim": {
        "storage": {"trafficLog": {"type": "newClaim"}},
        "retention": {"enabled": True, "suspend": True},
    },
    "capture only": {"storage": {"trafficLog": {"type": "emptyDir", "size": "5Gi"}}},
    "monitoring": {
        "metrics": {
            "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
            "dashboard": {"enabled": True, "annotations": {"grafana_folder": "LLM"}},
        }
    },
    "Pod monitor": {"metrics": {"podMonitor": {"enabled": True, "interval": "30s"}}},
    "network policy": {
        "storage": BUCKETS,
        "retraining": {"cron": {"enabled": True}},
        "networkPolicy": {
            "enabled": True,
            "clients": [{"podSelector": {"matchLabels": {"app": "chat"}}}],
            "metrics": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
        },
    },
    "digest, names and accounts": {
        "image": {"repository": "registry.example/redraft", "digest": "sha256:" + "a" * 64},
        "imagePullSecrets": [{"name": "pull"}],
        "fullnameOverride": "llm",
        "commonLabels": {"team": "inference"},
        "serviceAccount": {"create": False, "name": "existing"},
        "service": {"type": "LoadBalancer", "port": 443, "annotations": {"example.com/internal": "true"}},
        "test": {"apiKeySecret": "key"},
    },
    "extras": {
        "server": {
            "extraEnv": {
                "HTTPS_PROXY": "http://proxy:3128",
                "NODE": {"valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
            },
            "configFromSecret": {"model.draft": {"name": "drafts", "key": "path"}},
            "extraVolumes": [{"name": "weights", "persistentVolumeClaim": {"claimName": "weights"}}],
            "extraVolumeMounts": [{"name": "weights", "mountPath": "/weights", "readOnly": True}],
            "podAnnotations": {"example.com/a": "b"},
            "podLabels": {"tier": "gpu"},
            "topologySpread": {"enabled": False},
            "drain": {"preStopSeconds": 0, "graceSeconds": 300},
        }
    },
    "as a subchart": {"global": {"imageRegistry": "registry.example"}},
}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "typo at the top": ({"sever": {}}, "sever"),
    "typo inside": ({"server": {"replica": 2}}, "replica"),
    "typo in a group of settings": ({"server": {"config": {"engin": {}}}}, "engin"),
    "typo in a setting": ({"server": {"config": {"engine": {"max_batch_token": 1}}}}, "max_batch_token"),
    "a setting out of range": ({"server": {"config": {"traffic_log": {"sample_rate": 1.5}}}}, "sample_rate"),
    "a setting of another type": ({"server": {"config": {"engine": {"prefix_cache": "yes"}}}}, "prefix_cache"),
    "a setting that the chart gives": ({"server": {"config": {"grpc": {"port": 1}}}}, "port"),
    "a secret for no setting": (
        {"server": {"configFromSecret": {"model.drft": {"name": "s", "key": "k"}}}},
        "configFromSecret",
    ),
    "a setting as environment": ({"server": {"extraEnv": {"redraft_server__grpc__port": "1"}}}, "server.config"),
    "environment that the chart sets": ({"server": {"extraEnv": {"HF_HOME": "/x"}}}, "HF_HOME is set by the chart"),
    "a setting twice": (
        {
            "server": {
                "config": {"model": {"draft": "a"}},
                "configFromSecret": {"model.draft": {"name": "s", "key": "k"}},
            }
        },
        "MODEL__DRAFT is set by the chart already",
    ),
    "a URL twice": (
        {"storage": BUCKETS, "server": {"configFromSecret": {"registry.url": {"name": "s", "key": "k"}}}},
        "REGISTRY__URL is set by the chart already",
    ),
    "processes without GPUs": (
        {"server": {"config": {"model": {"tensor_parallel": 4}}, "gpu": {"count": 2}}},
        "set server.gpu.count to as many",
    ),
    "no replicas as text": ({"server": {"replicas": "two"}}, "replicas"),
    "two schedulers": (
        {"storage": BUCKETS, "retraining": {"cron": {"enabled": True}, "loop": {"enabled": True}}},
        "enable one of the two",
    ),
    "retraining without traffic": ({"retraining": {"cron": {"enabled": True}}}, "storage.trafficLog.type must be"),
    "retention without traffic": ({"retention": {"enabled": True}}, "storage.trafficLog.type must be"),
    "retention twice": (
        {
            "storage": BUCKETS,
            "retention": {"enabled": True},
            "server": {"config": {"traffic_log": {"retention_days": 3}}},
        },
        "RETENTION_DAYS is set by the chart already",
    ),
    "retention of everything": ({"storage": BUCKETS, "retention": {"enabled": True, "days": 0}}, "days"),
    "a pattern that does not exist": ({"server": {"config": {"traffic_log": {"redact": ["emial"]}}}}, "redact"),
    "retraining with a registry of its own": (
        {"storage": {**BUCKETS, "registry": {"type": "emptyDir"}}, "retraining": {"runNow": "x"}},
        "storage.registry.type must be",
    ),
    "a schedule that is none": ({"retraining": {"cron": {"schedule": "hourly"}}}, "schedule"),
    "a claim without name": ({"storage": {"registry": {"type": "existingClaim"}}}, "name it in storage.registry"),
    "a claim that is not used": ({"storage": {"registry": {"existingClaim": "c"}}}, "set the type to existingClaim"),
    "a URL that is none": ({"storage": {"registry": {"type": "url", "url": "bucket/drafts"}}}, "url"),
    "a URL that is not used": ({"storage": {"trafficLog": {"url": "s3://b/t"}}}, "set the type to url"),
    "a model cache in a bucket": ({"storage": {"modelCache": {"type": "url"}}}, "modelCache"),
    "a new claim of no size": ({"storage": {"registry": {"type": "newClaim", "size": ""}}}, "storage.registry.size"),
    "client certificates without TLS": ({"tls": {"clientAuth": True}}, "tls.existingSecret"),
    "mutual TLS and no client for the test": (
        {"tls": {"existingSecret": "s", "clientAuth": True}},
        "tls.testClientSecret",
    ),
    "API keys and none for the test": ({"auth": {"existingSecret": "s"}}, "test.apiKeySecret"),
    "a spool of a size that the chart cannot know": (
        {"server": {"configFromSecret": {"traffic_log.spool_bytes": {"name": "s", "key": "k"}}}},
        "give it in server.config",
    ),
    "an update that cannot proceed": ({"server": {"strategy": {"maxSurge": 0}}}, "cannot proceed"),
    "fewest above most": ({"autoscaling": {"enabled": True, "minReplicas": 9}}, "more than autoscaling.maxReplicas"),
    "scraped twice": (
        {"metrics": {"serviceMonitor": {"enabled": True}, "podMonitor": {"enabled": True}}},
        "enable one of the two",
    ),
    "an unknown limit": ({"metrics": {"prometheusRule": {"thresholds": {"errors": 1}}}}, "errors"),
    "an alert that does not exist": (
        {"metrics": {"prometheusRule": {"enabled": True, "disabled": ["RedraftQueueLogn"]}}},
        "RedraftQueueLogn",
    ),
    "a digest that is none": ({"image": {"digest": "latest"}}, "digest"),
}
"""Why -> (values, what the message says)."""

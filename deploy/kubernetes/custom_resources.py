"""Checks custom resources against their definitions.

    kubectl kustomize deploy/llm-d | python3 deploy/kubernetes/custom_resources.py CRDS

CRDS is a folder with the YAML files of the CustomResourceDefinitions (those of the Gateway API, its inference extension,
Istio, KEDA, the Prometheus operator), in subfolders too. Needs PyYAML and jsonschema. Rules in CEL are not looked at.
"""

import pathlib
import sys

import jsonschema
import yaml


def strict(schema):
    """A structural schema as JSON Schema that refuses unknown fields."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string") is True:
        result.pop("type", None)
    elif isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result.setdefault("additionalProperties", False)
    return result


def definitions(folder: pathlib.Path) -> dict:
    found = {}
    for path in sorted(folder.rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            if isinstance(document, dict) and document.get("kind") == "CustomResourceDefinition":
                spec = document["spec"]
                for version in spec["versions"]:
                    key = f"{spec['group']}/{version['name']}", spec["names"]["kind"]
                    schema = strict(version["schema"]["openAPIV3Schema"])
                    # The API server knows these three better than the definition.
                    for name in ("apiVersion", "kind", "metadata"):
                        schema.setdefault("properties", {})[name] = {}
                    found[key] = jsonschema.Draft7Validator(schema)
    return found


def main() -> int:
    known = definitions(pathlib.Path(sys.argv[1]))
    wrong = 0
    for document in yaml.safe_load_all(sys.stdin):
        key = document["apiVersion"], document["kind"]
        name = f"{document['kind']} {document['metadata']['name']}"
        if key in known:
            errors = [f"{'.'.join(map(str, error.path))}: {error.message}" for error in known[key].iter_errors(document)]
            wrong += len(errors)
            print(f"{name}: {'; '.join(errors) or 'ok'}")
        elif "." in (group := key[0].split("/")[0]) and group not in BUILT_IN:
            print(f"{name}: no definition of {key[0]}")
    return min(wrong, 1)


# Groups with a dot in their name that every API server has.
BUILT_IN = {"rbac.authorization.k8s.io", "networking.k8s.io"}

if __name__ == "__main__":
    sys.exit(main())

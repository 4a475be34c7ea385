"""The entities of seed 003: what each accepts, and that a refusal lists every wrong field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema_rs import Draft202012Validator

from strongroom import Entity, Strongroom
from strongroom.entities import Registry
from strongroom.errors import InvalidInput, SchemaError
from strongroom.tenants import ENTITIES, CloudAccount, Configuration, Role, ServiceAccount, Tenant, User

ARN = "arn:aws:iam::123456789012:role/costs"
UUID = "3f2504e0-4f89-41d3-9a0c-0305e82c3301"
OCID = "ocid1.tenancy.oc1..aaaaaaaaba3pv6wkcr4jqae5f44n2b2m2yt2j6rx32uzr4h25vqstifsfdsq"

GOOD: list[tuple[type[Entity], dict[str, Any]]] = [
    (Tenant, {"id": "acme", "name": "Acme Inc.", "plan": "gold", "contact_email": "ops@acme.example", "metadata": {}}),
    (User, {"email": "ann@example.com"}),
    (
        User,
        {
            "email": "j.o'hara+x@mail.example.co.uk",
            "display_name": "Jo",
            "status": "invited",
            "roles": ["owner", "billing:read"],
            "external_subject": "auth0|5f7c8ec7c33c6c004bbafe82",
            "metadata": {"locale": "de"},
        },
    ),
    (ServiceAccount, {"name": "importer", "description": "Reads bills.", "roles": ["writer"]}),
    (Role, {"id": "billing", "scopes": ["read", "auditor"], "permissions": ["costs:read", "reports/*"]}),
    (Configuration, {"id": "billing.currency", "value": {"code": "EUR"}, "schema_version": 2}),
    (CloudAccount, {"provider": "aws", "account_id": "123456789012", "role_arn": ARN, "external_id": "x-17"}),
    (CloudAccount, {"provider": "azure", "account_id": UUID, "directory_id": UUID, "client_id": UUID}),
    (
        CloudAccount,
        {
            "provider": "gcp",
            "account_id": "my-project-1",
            "service_account": "costs@my-project-1.iam.gserviceaccount.com",
            "regions": ["europe-west3"],
        },
    ),
    (CloudAccount, {"provider": "oci", "account_id": OCID, "credentials": "-----BEGIN"}),
]

BAD: list[tuple[type[Entity], dict[str, Any], list[str]]] = [
    (
        Tenant,
        {"id": "x" * 129, "status": "gone", "contact_email": "x", "plan": ""},
        ["contact_email", "id", "plan", "status"],
    ),
    (Tenant, {"id": "a", "metadata": {"x": "y" * 20_000}, "settings": []}, ["metadata", "settings"]),
    (User, {"email": "no", "roles": ["1x", "ok"], "status": "x", "nope": 1}, ["email", "nope", "roles.0", "status"]),
    (User, {"email": "a@b", "external_subject": "", "roles": ["a", "a"]}, ["email", "external_subject", "roles"]),
    (ServiceAccount, {"description": "x" * 2_001, "roles": "admin"}, ["description", "name", "roles"]),
    (Role, {"scopes": ["root", "read"], "permissions": ["strongroom:admin"]}, ["id", "permissions.0", "scopes.0"]),
    (Role, {"id": "../x", "scopes": ["read", "read"]}, ["id", "scopes"]),
    (Configuration, {"id": "", "value": [], "schema_version": 0}, ["id", "schema_version", "value"]),
    (CloudAccount, {"provider": "ibm", "credentials": 5}, ["account_id", "credentials", "provider"]),
    (CloudAccount, {"provider": "aws", "account_id": "12", "role_arn": "x"}, ["account_id", "role_arn"]),
    (CloudAccount, {"provider": "azure", "account_id": "12", "role_arn": ARN}, ["account_id", "role_arn"]),
    (CloudAccount, {"provider": "gcp", "account_id": "My", "regions": ["?"]}, ["account_id", "regions.0"]),
    (CloudAccount, {"provider": "oci", "account_id": "ocid1.user.oc1..a"}, ["account_id"]),
]


@pytest.mark.parametrize(("cls", "fields"), GOOD)
def test_what_an_engineer_expects_is_accepted(cls: type[Entity], fields: dict[str, Any]) -> None:
    entity = cls.parse(fields)
    assert {name: getattr(entity, name) for name in fields} == fields


@pytest.mark.parametrize(("cls", "fields", "paths"), BAD)
def test_schema_validation_rejects_invalid_payloads_with_detailed_errors(
    cls: type[Entity], fields: dict[str, Any], paths: list[str]
) -> None:
    """Seed 003, section 8.1: every wrong field is named, with what was found and what was expected."""
    with pytest.raises(InvalidInput) as refused:
        cls.parse(fields)
    assert sorted({problem.path for problem in refused.value.problems}) == paths
    for problem in refused.value.problems:
        assert problem.message in ("is required", "is not a known field") or (
            "expected" in problem.message or problem.message.startswith("is required: ")
        )


def test_an_email_is_kept_in_lower_case_so_that_one_mailbox_is_one_user() -> None:
    assert User(email="Ann@Example.COM").email == "ann@example.com"


def test_the_message_about_wrong_credentials_does_not_show_them() -> None:
    with pytest.raises(InvalidInput) as refused:
        CloudAccount.parse({"provider": "aws", "account_id": "123456789012", "credentials": "s3cret" * 9_999})
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(("cls", "fields"), GOOD)
def test_the_exported_json_schema_accepts_what_is_accepted(cls: type[Entity], fields: dict[str, Any]) -> None:
    schema = Registry(ENTITIES).json_schema()[cls.__collection__.name]
    assert not list(Draft202012Validator(schema).iter_errors(fields))


@pytest.mark.parametrize(
    ("name", "fields", "path"),
    [
        ("cloud_accounts", {"provider": "aws", "account_id": "12"}, ["account_id"]),
        (
            "cloud_accounts",
            {"provider": "gcp", "account_id": "my-project", "client_id": "3f2504e0-4f89-41d3-9a0c-0305e82c3301"},
            ["client_id"],
        ),
        ("roles", {"id": "x", "scopes": ["root"]}, ["scopes", 0]),
        ("users", {"email": "a@example.com", "roles": ["1"]}, ["roles", 0]),
        ("configurations", {"id": "x", "value": 1}, ["value"]),
    ],
)
def test_the_exported_json_schema_refuses_what_is_refused(name: str, fields: dict[str, Any], path: list[Any]) -> None:
    schema = json.loads(json.dumps(Registry(ENTITIES).json_schema()[name]))
    assert [list(error.instance_path) for error in Draft202012Validator(schema).iter_errors(fields)] == [path]


class Users(Entity, collection="users"):
    """An application's own."""

    name: str


class Exports(Entity, collection="export"):
    name: str


async def test_an_applications_entity_with_a_reserved_name_is_refused_at_the_start() -> None:
    for cls, name in ((Users, "users"), (Exports, "export")):
        with pytest.raises(SchemaError) as refused:
            async with Strongroom.open("json://:memory:", entities=[cls]):
                pass
        assert f"test_model.{cls.__name__} declares the collection {name!r}, which is reserved" in str(refused.value)
    async with Strongroom.open("json://:memory:", entities=[User]):
        pass  # Strongroom's own class, named once more

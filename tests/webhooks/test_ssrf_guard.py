"""The guard against request forgery: every form of a private address is refused, in URLs and behind names."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.errors import InvalidInput
from strongroom.webhooks.ssrf_guard import Refused, address_problem, addresses_of, parse_url

PRIVATE = [
    "127.0.0.1", "127.255.255.254", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",  # loopback, private
    "100.64.0.1", "100.127.255.255",  # shared by carriers
    "198.18.0.1", "192.0.2.1", "198.51.100.1", "203.0.113.1", "240.0.0.1", "192.0.0.8", "192.88.99.1",
    "::1", "fc00::1", "fd12::1", "fec0::1", "2001:db8::1", "3fff::1", "100::1", "5f00::1",
    "64:ff9b:1::1", "::7f00:1", "2002:7f00:1::", "2002:0a00:1::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:a00:1", "64:ff9b::7f00:1", "64:ff9b::10.0.0.1",
]  # fmt: skip
NEVER = [
    "0.0.0.0", "0.1.2.3", "169.254.169.254", "169.254.0.1", "224.0.0.1", "239.255.255.255", "255.255.255.255",  # noqa: S104
    "::", "fe80::1", "ff02::1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "::ffff:0.0.0.0",
]  # fmt: skip
METADATA = [
    "fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254",  # Amazon, Google
    "100.100.100.200", "168.63.129.16", "192.0.0.192",  # Alibaba, Azure, Oracle
    "::169.254.169.254", "::ffff:0:169.254.169.254",  # IPv4-compatible, translated
    "2002:a9fe:a9fe::", "2002:a9fe:a9fe::1", "2002:6464:64c8::1",  # 6to4
    "64:ff9b::169.254.169.254", "64:ff9b::100.100.100.200", "64:ff9b::168.63.129.16",  # NAT64
    "64:ff9b:1::169.254.169.254", "64:ff9b:1:a9fe:a9:fe00::", "64:ff9b:1:a9:fe:a9fe::", "64:ff9b:1:0:a9:fea9:fe00::",
    "2001:0:a9fe:a9fe:8000:63bf:3fff:fdd2", "2001:0:4136:e378:8000:63bf:5601:5601",  # Teredo: server, client
    "fd00::5efe:169.254.169.254", "fe80::200:5efe:a9fe:a9fe",  # ISATAP
    "::ffff:168.63.129.16", "::ffff:100.100.100.200",
]  # fmt: skip
PUBLIC = ["1.1.1.1", "8.8.8.8", "100.63.255.255", "100.128.0.1", "2606:4700::1111", "2a00:1450:4001::1",
          "::ffff:8.8.8.8", "64:ff9b::808:808"]  # fmt: skip


@pytest.mark.parametrize("text", PRIVATE)
def test_a_private_address_is_allowed_only_with_allow_private(text: str) -> None:
    assert text[:4] in str(address_problem(ip_address(text)))
    assert address_problem(ip_address(text), allow_private=True) is None


@pytest.mark.parametrize("text", NEVER)
def test_link_local_multicast_and_unspecified_addresses_are_never_allowed(text: str) -> None:
    assert address_problem(ip_address(text)) is not None
    assert address_problem(ip_address(text), allow_private=True) is not None


@pytest.mark.parametrize("text", METADATA)
def test_cloud_metadata_services_are_never_allowed_in_any_form(text: str) -> None:
    for allow_private in (False, True):
        assert str(ip_address(text)) in str(address_problem(ip_address(text), allow_private))


@given(st.integers(0, 2**32 - 1))
def test_an_embedded_address_is_refused_where_the_address_itself_is(number: int) -> None:
    """6to4, NAT64, Teredo and ISATAP, also of addresses that are drawn."""
    for v4 in (number, 0xA9FE << 16 | number & 0xFFFF):
        if v4 >> 24 and address_problem(IPv4Address(v4), allow_private=True) is not None:
            for form in (
                0x2002 << 112 | v4 << 80 | number,
                0x64FF9B << 96 | v4,
                0x64FF9B0001 << 80 | v4,
                0x20010000 << 96 | v4 << 64 | number,
                0x20010000 << 96 | v4 ^ 0xFFFFFFFF,
                0xFD << 120 | 0x5EFE << 32 | v4,
            ):
                assert address_problem(IPv6Address(form), allow_private=True) is not None


@pytest.mark.parametrize("text", PUBLIC)
def test_a_public_address_is_allowed(text: str) -> None:
    assert address_problem(ip_address(text)) is None


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_every_ipv6_form_of_an_ipv4_address_has_the_same_verdict(number: int, allow_private: bool) -> None:
    plain = address_problem(IPv4Address(number), allow_private) is None
    for prefix in (0xFFFF << 32, 0x64FF9B << 96):
        assert (address_problem(IPv6Address(prefix | number), allow_private) is None) == plain


@given(st.integers(0, 2**128 - 1).map(IPv6Address))
def test_addresses_outside_global_unicast_are_refused(address: IPv6Address) -> None:
    is_translated = address in (IPv6Address(0xFFFF << 32 | int(address) & 0xFFFFFFFF),)
    if int(address) >> 125 != 1 and not is_translated:
        assert address_problem(address) is not None


# --- URLs -----------------------------------------------------------------------------------------------------


def problem(url: str, **more: bool) -> str:
    """Why a URL is refused; it names the field `url`."""
    with pytest.raises(InvalidInput) as caught:
        parse_url(url, **more)
    (only,) = caught.value.problems
    assert only.path == "url"
    return only.message


@pytest.mark.parametrize(
    "host",
    ["2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "127.1", "127.0.0.1.", "127.0.0.256", "1.2.3.4.5", "127.0.1",
     "0", "00.0.0.0", "%31%32%37.0.0.1", "[::1]", "[::ffff:7f00:1]", "[fe80::1%25eth0]", "[::1", "localhost",
     "LOCALHOST", "localhost.", "a.localhost", "①②⑦.0.0.1", "127。0。0。1", "", ".", "a..b", "-a.example", "a b",
     "a\\b", "exa_mple\x00.com", "169.254.169.254", "10.0.0.1", "[fd00::1]"],
)  # fmt: skip
def test_every_spelling_of_a_private_host_is_refused(host: str) -> None:
    assert problem(f"https://{host}/hook")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://example.com/", "found the scheme 'http', expected https"),
        ("ftp://example.com/", "found the scheme 'ftp'"),
        ("//example.com/", "found no scheme"),
        ("example.com", "found no scheme"),
        ("https://user:secret-of-mine@example.com/", "found a user name"),
        ("https://@example.com/", "found a user name"),
        ("https://example.com/#part", "found a fragment"),
        ("https://example.com/#", "found a fragment"),
        ("https://example.com:25/", "found the port 25, expected 443 or one from 1024 on"),
        ("https://example.com:0/", "found the port 0"),
        ("https://example.com:99999/", "is not a URL"),
        ("https://example.com:x/", "is not a URL"),
        ("https://exämple.com/", "expected printable ASCII"),
        ("https://example.com/a b", "expected printable ASCII"),
        ("https://example.com/\r\nHost: other", "expected printable ASCII"),
        ("https:\\\\example.com", "expected printable ASCII"),
        ("", "found 0 characters"),
        ("https://example.com/" + "a" * 2_048, "found 2068 characters"),
        ("https:///path", "found no host, expected the name of one"),
    ],
)
def test_a_refused_url_says_what_was_found_and_expected(url: str, said: str) -> None:
    message = problem(url)
    assert said in message
    assert "secret-of-mine" not in message


def test_a_url_is_parsed_into_scheme_host_port_and_path() -> None:
    target = parse_url("https://Hooks.Example.com:8443/a%2Fb?x=%20")
    assert (target.scheme, target.host, target.port, target.path) == (
        "https",
        "hooks.example.com",
        8443,
        "/a%2Fb?x=%20",
    )
    assert target.authority == "hooks.example.com:8443"
    assert parse_url("https://example.com").authority == "example.com"
    assert parse_url("https://example.com").path == "/"
    assert parse_url("https://[2606:4700::1111]/").authority == "[2606:4700::1111]"


def test_allow_private_allows_plain_http_and_every_port() -> None:
    assert parse_url("http://127.0.0.1/", allow_private=True).port == 80
    assert parse_url("http://localhost:25/", allow_private=True).host == "localhost"
    assert "link-local" in problem("http://169.254.169.254/latest/meta-data", allow_private=True)
    assert "four decimal numbers" in problem("http://0x7f.1/", allow_private=True)


# --- Names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", [["10.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["8.8.8.8", "::1"], ["fe80::1%eth0"]])
async def test_a_name_with_one_private_address_is_refused(found: list[str]) -> None:
    async def resolver(host: str, port: int) -> Sequence[str]:
        assert (host, port) == ("hooks.example", 443)
        return found

    with pytest.raises(Refused, match=r"hooks\.example: found the address"):
        await addresses_of(parse_url("https://hooks.example/"), allow_private=False, resolver=resolver)


async def test_a_name_without_addresses_raises_the_resolvers_error() -> None:
    async def resolver(host: str, port: int) -> Sequence[str]:
        return []

    with pytest.raises(OSError, match="has no address"):
        await addresses_of(parse_url("https://hooks.example/"), allow_private=False, resolver=resolver)


async def test_an_address_in_the_url_is_not_resolved() -> None:
    async def resolver(host: str, port: int) -> Sequence[str]:
        raise AssertionError

    assert await addresses_of(parse_url("https://8.8.8.8/"), allow_private=False, resolver=resolver) == ["8.8.8.8"]

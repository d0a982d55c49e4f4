"""TLS with a certificate of our own."""

import datetime
import functools
import http.client
import ipaddress
import ssl
import urllib.error
import urllib.request

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from conftest import served


def make_certificate(directory):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (directory / "cert.pem").write_bytes(certificate.public_bytes(pem))
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (directory / "key.pem").write_bytes(private)
    return str(directory / "cert.pem"), str(directory / "key.pem")


def test_tls(tmp_path):
    cert, key = make_certificate(tmp_path)
    trusting = ssl.create_default_context(cafile=cert)
    opener = functools.partial(urllib.request.urlopen, context=trusting)
    with served("--tls-cert", cert, "--tls-key", key, opener=opener) as url:
        assert url.startswith("https://")
        assert opener(url + "/health").status == 200
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(url + "/health")
        with pytest.raises((urllib.error.URLError, ConnectionError, http.client.HTTPException)):
            urllib.request.urlopen(url.replace("https", "http") + "/health")

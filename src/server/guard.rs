//! Who may ask: API keys, and the hosts and origins that a request may name. Every route is guarded but those listed here as public.

use axum::http::{HeaderMap, header};
use ring::digest::{SHA256, digest};
use subtle::ConstantTimeEq;

use super::error::ApiError;
use super::page;

/// Routes that need no key, beside the page's own files: probes.
const PUBLIC: [&str; 2] = ["/health", "/ready"];

/// Keys that clients may send, by name. Of the keys themselves only digests are kept.
#[derive(Debug, Clone, Default)]
pub struct ApiKeys(Vec<(String, [u8; 32])>);

impl ApiKeys {
    /// Adds a key; logs say its name.
    pub fn add(&mut self, name: impl Into<String>, key: &str) {
        self.0.push((name.into(), sha256(key)));
    }

    /// True where none is needed.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The name of a key. It takes the same time whichever key is given, known or not.
    fn find(&self, key: &str) -> Option<&str> {
        let given = sha256(key);
        self.0.iter().fold(None, |found, (name, known)| match bool::from(known.ct_eq(&given)) {
            true => Some(name.as_str()),
            false => found,
        })
    }
}

fn sha256(text: &str) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest(&SHA256, text.as_bytes()).as_ref());
    bytes
}

/// The checks of a server.
#[derive(Debug, Clone, Default)]
pub(super) struct Guard {
    pub(super) keys: ApiKeys,
    /// Hosts that requests may name, in lower case, without ports; none allows all.
    pub(super) hosts: Vec<String>,
    /// Origins of pages that may ask; `*` for any.
    pub(super) origins: Vec<String>,
}

impl Guard {
    /// The name of the key that a request to `path` came with, if it needed one.
    ///
    /// # Errors
    /// 401, or 403 for another host or origin.
    pub(super) fn check(
        &self,
        path: &str,
        headers: &HeaderMap,
        authority: Option<&str>,
    ) -> Result<Option<&str>, ApiError> {
        self.check_host(headers, authority)?;
        if PUBLIC.contains(&path) || page::is_file(path) || self.keys.is_empty() {
            return Ok(None);
        }
        let key = bearer(headers).or_else(|| headers.get("x-api-key")?.to_str().ok());
        key.and_then(|key| self.keys.find(key)).map(Some).ok_or_else(ApiError::unauthorized)
    }

    /// A page of another site whose name was made to lead here would name that site.
    fn check_host(&self, headers: &HeaderMap, authority: Option<&str>) -> Result<(), ApiError> {
        let text = |name| headers.get(name).and_then(|value: &axum::http::HeaderValue| value.to_str().ok());
        if headers.get_all(header::HOST).iter().count() > 1 {
            return Err(ApiError::forbidden("the request names several hosts"));
        }
        let host = authority.or_else(|| text(header::HOST));
        if !self.hosts.is_empty() {
            let name = host.map(|host| without_port(host).to_ascii_lowercase());
            if !name.as_ref().is_some_and(|name| self.hosts.contains(name)) {
                let message = "this server does not answer to that host; --allowed-host names those it answers to";
                return Err(ApiError::forbidden(message));
            }
        }
        let Some(origin) = headers.get(header::ORIGIN) else { return Ok(()) };
        let origin = origin.to_str().unwrap_or_default();
        let same =
            origin.split_once("://").is_some_and(|(_, of)| host.is_some_and(|host| of.eq_ignore_ascii_case(host)));
        if same || self.origins.iter().any(|allowed| allowed == "*" || allowed.eq_ignore_ascii_case(origin)) {
            return Ok(());
        }
        Err(ApiError::forbidden("pages of that origin may not ask; --allowed-origin names those that may"))
    }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, key) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

/// `[::1]:8000` and `localhost:8000` without their ports.
fn without_port(host: &str) -> &str {
    match host.rfind(':') {
        Some(colon) if !host.ends_with(']') => &host[..colon],
        _ => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    fn guard() -> Guard {
        let mut keys = ApiKeys::default();
        keys.add("alice", "secret-a");
        keys.add("bob", "secret-b");
        let hosts = ["localhost", "127.0.0.1", "[::1]"].map(str::to_owned).to_vec();
        Guard { keys, hosts, origins: vec!["https://app.example".into()] }
    }

    #[test]
    fn keys() {
        let guard = guard();
        let with = |path: &str, pairs: &[(&'static str, &str)]| {
            let mut headers = headers(pairs);
            headers.insert(header::HOST, "localhost:8000".parse().unwrap());
            guard.check(path, &headers, None).map(|name| name.map(str::to_owned)).map_err(|error| error.status.as_u16())
        };
        assert_eq!(with("/v1/models", &[("authorization", "Bearer secret-b")]), Ok(Some("bob".into())));
        assert_eq!(with("/v1/messages", &[("x-api-key", "secret-a")]), Ok(Some("alice".into())));
        assert_eq!(with("/health", &[]), Ok(None));
        let long = "x".repeat(10_000);
        for bad in
            ["Bearer secret-c", "Bearer ", "Bearer", "Basic secret-a", "secret-a", "Bearer secret-a secret-b", &long]
        {
            assert_eq!(with("/v1/models", &[("authorization", bad)]), Err(401), "{bad}");
        }
        for path in ["/v1/models", "/metrics", "/nowhere", "/health/", "//health", "/v1/../health"] {
            assert_eq!(with(path, &[]), Err(401), "{path}");
        }
    }

    #[test]
    fn hosts_and_origins() {
        let guard = Guard { keys: ApiKeys::default(), ..guard() };
        let with = |pairs: &[(&'static str, &str)]| guard.check("/", &headers(pairs), None).is_ok();
        for host in ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]", "[::1]:8000"] {
            assert!(with(&[("host", host)]), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example", "127.0.0.2", "", "[::2]:8000"] {
            assert!(!with(&[("host", host)]), "{host}");
        }
        assert!(!with(&[]), "no host at all");
        let from = |origin: &str| with(&[("host", "localhost:8000"), ("origin", origin)]);
        assert!(from("http://localhost:8000") && from("https://app.example"));
        assert!(!from("http://localhost:9000") && !from("https://app.example.evil") && !from("null"));
    }
}

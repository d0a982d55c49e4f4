//! Sockets: TCP, Unix and TLS; limits of connections; and how they end.

use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, watch};
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::error::{Error, Result};

/// How long a TLS handshake, and the headers of a request, may take to arrive.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a client may leave what is written unread.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bind {
    /// A name or address, and a port; 0 is any that is free.
    Tcp(String, u16),
    /// A socket in the file system.
    Unix(PathBuf),
}

/// A certificate chain and its key, both PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// File of the chain, the server's own certificate first.
    pub cert: PathBuf,
    /// File of the private key.
    pub key: PathBuf,
}

impl Tls {
    /// Reads both files.
    ///
    /// # Errors
    /// `Io`, or `Input` when they hold no certificate, no key, or do not belong together.
    pub(super) fn acceptor(&self) -> Result<TlsAcceptor> {
        let read = |path: &Path| std::fs::read(path).map_err(Error::io(path));
        let bad =
            |flag: &str, path: &Path, e: &dyn std::fmt::Display| Error::input(flag, format!("{}: {e}", path.display()));
        let chain: Vec<_> = CertificateDer::pem_slice_iter(&read(&self.cert)?)
            .collect::<Result<_, _>>()
            .map_err(|e| bad("--tls-cert", &self.cert, &e))?;
        if chain.is_empty() {
            return Err(bad("--tls-cert", &self.cert, &"holds no certificate in PEM"));
        }
        let key = PrivateKeyDer::from_pem_slice(&read(&self.key)?).map_err(|e| bad("--tls-key", &self.key, &e))?;
        let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key));
        let mut config = config.map_err(|e| bad("--tls-cert", &self.cert, &e))?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}

/// A socket that is bound.
pub(super) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, SocketFile),
}

/// A socket's file, which goes with it.
pub(super) struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Listener {
    /// Binds it.
    ///
    /// # Errors
    /// `Input` naming the address and what the system says.
    pub(super) async fn bind(bind: &Bind) -> Result<Listener> {
        match bind {
            Bind::Tcp(host, port) => {
                let listener = TcpListener::bind((host.as_str(), *port)).await;
                listener.map(Listener::Tcp).map_err(|e| Error::input("--host, --port", format!("{host}:{port}: {e}")))
            }
            Bind::Unix(path) => {
                // A socket that nobody listens to is left from a server that was killed; any other file is somebody's.
                let is_socket = std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
                if is_socket
                    && std::os::unix::net::UnixStream::connect(path)
                        .is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused)
                {
                    let _ = std::fs::remove_file(path);
                }
                let listener = UnixListener::bind(path);
                let listener = listener.map_err(|e| Error::input("--uds", format!("{}: {e}", path.display())))?;
                Ok(Listener::Unix(listener, SocketFile(path.clone())))
            }
        }
    }

    /// Where clients find it.
    pub(super) fn address(&self, is_tls: bool) -> String {
        let scheme = if is_tls { "https" } else { "http" };
        match self {
            Listener::Tcp(listener) => match listener.local_addr() {
                Ok(SocketAddr::V4(at)) => format!("{scheme}://{at}"),
                Ok(SocketAddr::V6(at)) => format!("{scheme}://{at}"),
                Err(_) => scheme.to_owned(),
            },
            Listener::Unix(_, SocketFile(path)) => format!("unix:{}", path.display()),
        }
    }
}

/// Limits of connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// Connections at once; further ones wait.
    pub max_connections: usize,
    /// Bytes of a request's headers.
    pub max_header_bytes: usize,
}

impl Default for ConnectionLimits {
    fn default() -> ConnectionLimits {
        ConnectionLimits { max_connections: 16_384, max_header_bytes: 64 << 10 }
    }
}

/// Serves what connects until `closing` is true, then lets open connections finish what they have begun.
pub(super) async fn serve(
    listener: Listener,
    router: Router,
    tls: Option<TlsAcceptor>,
    limits: ConnectionLimits,
    mut closing: watch::Receiver<bool>,
) {
    let places = Arc::new(Semaphore::new(limits.max_connections));
    let graceful = GracefulShutdown::new();
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { break };
        let accepted = tokio::select! {
            stream = accept(&listener) => stream,
            _ = closing.wait_for(|closing| *closing) => break,
        };
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) => {
                // Too many open files, mostly: they are given back as connections end.
                tracing::warn!("accepting a connection failed: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let (router, tls, watcher) = (router.clone(), tls.clone(), graceful.watcher());
        tokio::spawn(async move {
            let _place = place;
            let stream: Box<dyn Stream> = match tls {
                None => stream,
                Some(tls) => match tokio::time::timeout(HEADER_TIMEOUT, tls.accept(stream)).await {
                    Ok(Ok(stream)) => Box::new(stream),
                    _ => return,
                },
            };
            let mut stream = TimeoutStream::new(stream);
            stream.set_write_timeout(Some(WRITE_TIMEOUT));
            let mut builder = Builder::new(TokioExecutor::new());
            builder
                .http1()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .max_buf_size(limits.max_header_bytes)
                .http2()
                .timer(TokioTimer::new())
                .max_header_list_size(limits.max_header_bytes as u32)
                .keep_alive_interval(Some(HEADER_TIMEOUT));
            let connection = builder.serve_connection(TokioIo::new(Box::pin(stream)), TowerToHyperService::new(router));
            // What goes wrong on a connection is the client's: it went away, or sent no HTTP.
            if let Err(error) = watcher.watch(connection.into_owned()).await {
                tracing::debug!("connection: {error}");
            }
        });
    }
    drop(listener);
    graceful.shutdown().await;
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

async fn accept(listener: &Listener) -> std::io::Result<Box<dyn Stream>> {
    match listener {
        Listener::Tcp(listener) => {
            let (stream, _) = listener.accept().await?;
            // Each token is a packet of its own.
            stream.set_nodelay(true)?;
            Ok(Box::new(stream))
        }
        Listener::Unix(listener, _) => Ok(Box::new(listener.accept().await?.0)),
    }
}

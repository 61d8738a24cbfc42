//! One request to a server, and what its answer means.

use std::io::{self, Read};
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use http::header::{CONTENT_RANGE, HeaderMap, RANGE};
use rustls::CertificateError;
use ureq::tls::{Certificate, RootCerts, TlsConfig};
use ureq::{Agent, Body};

use crate::Error;
use crate::error::text;

/// So many redirects are followed.
const REDIRECTS: u32 = 10;

/// What speaks HTTP and HTTPS. It goes through the proxy that the environment names.
pub(super) struct Client {
    agent: Agent,
    /// Why the host's certificates cannot be read, if so.
    untrusting: Option<String>,
}

/// What a server sends.
pub(super) enum Answer {
    /// The file from `start` on, of `total` bytes if that is known.
    Body {
        start: u64,
        total: Option<u64>,
        body: Box<dyn Read>,
    },
    /// It has no more than what is there.
    NothingMore,
}

/// Why there is nothing, or no more.
pub(super) enum Trouble {
    /// It may go better the next time.
    Passing(String),
    /// It will not.
    Lasting(Error),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Trouble::Lasting(error)
    }
}

impl Client {
    /// That gives up a server which is silent for so long.
    pub(super) fn new(silence: Duration) -> Client {
        let found = rustls_native_certs::load_native_certs();
        let errors = found.errors.iter().map(ToString::to_string);
        let untrusting = found.certs.is_empty().then(|| {
            errors
                .reduce(|all, one| all + "; " + &one)
                .unwrap_or_default()
        });
        let certificates = found.certs.iter();
        let certificates: Vec<_> = certificates
            .map(|der| Certificate::from_der(der).to_owned())
            .collect();
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::new_with_certs(&certificates))
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .build();
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(REDIRECTS)
            .timeout_resolve(Some(silence))
            .timeout_connect(Some(silence))
            .timeout_send_request(Some(silence))
            .timeout_recv_response(Some(silence))
            .timeout_per_read(Some(silence))
            .user_agent(concat!("launcher/", env!("CARGO_PKG_VERSION")))
            .tls_config(tls)
            .build();
        Client {
            agent: agent.into(),
            untrusting,
        }
    }

    /// Asks for what is behind the first `have` bytes. The answer may be the whole all the same.
    pub(super) fn get(&self, url: &str, have: u64) -> Result<Answer, Trouble> {
        let mut request = self.agent.get(url);
        if have > 0 {
            request = request.header(RANGE, format!("bytes={have}-"));
        }
        let response = request.call().map_err(|error| self.refused(url, error))?;
        let status = response.status();
        match status {
            StatusCode::OK => {
                let body = response.into_body();
                Ok(Answer::Body {
                    start: 0,
                    total: body.content_length(),
                    body: reader(body),
                })
            }
            StatusCode::PARTIAL_CONTENT if have > 0 => {
                let (start, total) = range(response.headers()).ok_or_else(|| {
                    let message = format!("{url} answers with a part, and does not say which");
                    Error::failed(message)
                })?;
                if start != have {
                    let message =
                        format!("{url} answers with what begins at {start}, not at {have}");
                    return Err(Error::failed(message).into());
                }
                Ok(Answer::Body {
                    start,
                    total,
                    body: reader(response.into_body()),
                })
            }
            StatusCode::RANGE_NOT_SATISFIABLE if have > 0 => Ok(Answer::NothingMore),
            _ => Err(unwelcome(url, status)),
        }
    }

    fn refused(&self, url: &str, error: ureq::Error) -> Trouble {
        let lasting = |why: &str, help: String| {
            Trouble::Lasting(Error::failed(format!("cannot fetch {url}: {why}")).help(help))
        };
        match error {
            ureq::Error::TooManyRedirects => lasting(
                &format!("it redirects more than {REDIRECTS} times"),
                "give the URL that it should lead to".into(),
            ),
            ureq::Error::HostNotFound => lasting(
                "the host is not found",
                "check the URL, and that this host has a network".into(),
            ),
            error => match certificate(&error) {
                Some(_) if self.untrusting.is_some() => {
                    let why = self.untrusting.as_deref().unwrap_or_default();
                    lasting(
                        "no certificate can be verified: none is known here",
                        format!("install ca-certificates, or set SSL_CERT_FILE ({why})"),
                    )
                }
                Some(why) => lasting(
                    &format!("its certificate is not trusted: {why}"),
                    "if it is right, name a file with that of its CA in SSL_CERT_FILE".into(),
                ),
                None => Trouble::Passing(said(&error)),
            },
        }
    }
}

fn reader(body: Body) -> Box<dyn Read> {
    Box::new(body.into_reader())
}

/// Where a part begins, and how long the whole is if the server knows: "bytes 5-9/10".
fn range(headers: &HeaderMap) -> Option<(u64, Option<u64>)> {
    let range = headers.get(CONTENT_RANGE)?.to_str().ok()?;
    let (range, total) = range.strip_prefix("bytes ")?.split_once('/')?;
    let (start, end) = range.split_once('-')?;
    let (start, end): (u64, u64) = (start.parse().ok()?, end.parse().ok()?);
    let total = match total {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    (start <= end && total.is_none_or(|total| end < total)).then_some((start, total))
}

/// The error for an answer that is not the file.
fn unwelcome(url: &str, status: StatusCode) -> Trouble {
    let answer = format!("the server answers {status}");
    let again = [
        StatusCode::REQUEST_TIMEOUT,
        StatusCode::TOO_MANY_REQUESTS,
        StatusCode::INTERNAL_SERVER_ERROR,
        StatusCode::BAD_GATEWAY,
        StatusCode::SERVICE_UNAVAILABLE,
        StatusCode::GATEWAY_TIMEOUT,
    ];
    if again.contains(&status) {
        return Trouble::Passing(answer);
    }
    let help = match status {
        StatusCode::NOT_FOUND | StatusCode::GONE => "check the URL: the file may have moved",
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            "it is not for everybody: fetch it yourself, and give its `path`"
        }
        _ => "check the URL",
    };
    Error::failed(format!("cannot fetch {url}: {answer}"))
        .help(help)
        .into()
}

/// The body has not come to its end.
pub(super) fn broken(error: io::Error) -> Trouble {
    Trouble::Passing(said(&error.into()))
}

/// An error of the connection, in words.
fn said(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Timeout(_) => "the server is silent".to_owned(),
        ureq::Error::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            "the server has closed the connection".to_owned()
        }
        ureq::Error::Io(error) => text(error),
        other => other.to_string(),
    }
}

/// What is wrong with a server's certificate, if that is the error.
fn certificate(error: &ureq::Error) -> Option<String> {
    let tls = match error {
        ureq::Error::Rustls(error) => error,
        ureq::Error::Io(error) => error.get_ref()?.downcast_ref::<rustls::Error>()?,
        _ => return None,
    };
    let rustls::Error::InvalidCertificate(why) = tls else {
        return None;
    };
    Some(match why {
        CertificateError::UnknownIssuer => "its issuer is unknown here".to_owned(),
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "it has expired".to_owned()
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            "it is for another host".to_owned()
        }
        other => other.to_string(),
    })
}

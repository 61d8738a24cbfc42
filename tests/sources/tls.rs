//! What is fetched by https: from servers with a certificate that this host knows.

use std::fs;
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;

use super::server::{Server, whole};
use super::{Folder, content, sha256};

/// A server with a certificate for 127.0.0.1 of a CA that was made for it, and that CA's.
fn server() -> (Server, String) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    let name = format!("authority {}", sha256(key.public_key_pem().as_bytes()));
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, key).unwrap();
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    let own = params.signed_by(&key, &ca).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![own.der().clone()],
            PrivateKeyDer::Pkcs8(key.serialize_der().into()),
        )
        .unwrap();
    let content = content();
    let server = Server::secure(Arc::new(config), move |request, stream| {
        whole(request, stream, &content)
    });
    (server, ca.pem())
}

fn folder(server: &Server) -> Folder {
    let url = server.url("vmlinuz");
    let digest = sha256(&content());
    Folder::new(&format!(
        "[boot.kernel]\nurl = \"{url}\"\nsha256 = \"{digest}\"\n"
    ))
}

#[test]
fn a_certificate_of_a_known_authority_is_trusted() {
    let (server, authority) = server();
    let folder = folder(&server);
    folder.write("ca.pem", authority);
    let mut prepare = folder.command(&["prepare"]);
    let prepare = prepare.env("SSL_CERT_FILE", folder.path("ca.pem"));
    let done = folder.told(prepare.output().unwrap());
    assert_eq!(done.code, 0, "{done:?}");
    let cached = folder.cached(&sha256(&content()), "vmlinuz");
    assert_eq!(fs::read(cached).unwrap(), content());
}

#[test]
fn a_certificate_of_an_unknown_authority_is_refused() {
    let (server, _) = server();
    let (_, another) = self::server();
    let folder = folder(&server);
    folder.write("ca.pem", another);
    let mut prepare = folder.command(&["prepare"]);
    let prepare = prepare.env("SSL_CERT_FILE", folder.path("ca.pem"));
    let done = folder.told(prepare.output().unwrap());
    let url = server.url("vmlinuz");
    let error = format!(
        "error: cannot fetch {url}: its certificate is not trusted: its issuer is unknown here\n"
    );
    assert!(done.code == 1 && done.err.contains(&error), "{done:?}");
    assert!(done.err.contains("--> vm.toml:2:7"), "{}", done.err);
    assert!(
        done.err.ends_with(
            "= help: if it is right, name a file with that of its CA in SSL_CERT_FILE\n"
        ),
        "{}",
        done.err
    );
    assert!(server.asked().is_empty(), "nothing is asked of it");
}

#[test]
fn without_any_certificate_nothing_is_trusted() {
    let (server, _) = server();
    let folder = folder(&server);
    folder.write("empty.pem", "");
    let mut prepare = folder.command(&["prepare"]);
    let prepare = prepare.env("SSL_CERT_FILE", folder.path("empty.pem"));
    let done = folder.told(prepare.output().unwrap());
    let error = "no certificate can be verified: none is known here\n";
    assert!(done.code == 1 && done.err.contains(error), "{done:?}");
    assert!(
        done.err
            .contains("help: install ca-certificates, or set SSL_CERT_FILE"),
        "{}",
        done.err
    );
}

//! Files that change while their configuration is in use.

use std::sync::{Arc, mpsc};

use super::*;
use crate::tls::options::Material;
use crate::tls::reload::Watch;

const DEADLINE: Duration = Duration::from_secs(30);

struct Files {
    folder: tempfile::TempDir,
}

impl Files {
    fn new(identity: &DevIdentity) -> Self {
        let files = Self { folder: tempfile::tempdir().unwrap() };
        files.write(identity);
        files
    }

    fn write(&self, identity: &DevIdentity) {
        std::fs::write(self.folder.path().join("chain.pem"), &identity.chain).unwrap();
        std::fs::write(self.folder.path().join("key.pem"), identity.key.expose()).unwrap();
    }

    fn options(&self) -> TlsOptions {
        let read = |name, field| Material::read(self.folder.path().join(name), field).unwrap();
        TlsOptions {
            credentials: Credentials::Certificate(OwnCertificate::pair(
                read("chain.pem", "credentials.chain"),
                read("key.pem", "key"),
            )),
            ..TlsOptions::default()
        }
    }
}

fn other() -> DevCertificates {
    dev_certificates(&[NAME], Duration::from_secs(600)).unwrap()
}

fn connect(server: &TlsConfig, authority: &str) -> Result<EnginePair, Error> {
    let client =
        TlsOptions { roots: Roots::Own(authority.as_bytes().to_vec().into()), ..TlsOptions::default() };
    let client = TlsConfig::new(&client).unwrap().engine(&role()).unwrap();
    let mut pair = EnginePair::new(client, server.engine(&Role::Server).unwrap());
    pair.shake_hands().map_err(|(_, error)| error)?;
    Ok(pair)
}

#[test]
fn a_reload_is_for_new_connections_and_running_ones_go_on() {
    let (first, second) = (certificates(), other());
    let files = Files::new(&first.server);
    let server = TlsConfig::new(&files.options()).unwrap();
    let mut running = connect(&server, &first.authority).unwrap();
    assert!(!server.reload().unwrap(), "nothing has changed");
    files.write(&second.server);
    connect(&server, &first.authority).unwrap();
    assert!(server.reload().unwrap());
    connect(&server, &second.authority).unwrap();
    assert!(connect(&server, &first.authority).is_err());
    exchange(&mut running, b"still here").unwrap();
}

#[test]
fn garbage_is_refused_and_the_old_files_stay_in_use() {
    let (first, second) = (certificates(), other());
    let files = Files::new(&first.server);
    let server = TlsConfig::new(&files.options()).unwrap();
    let garbage = |chain: &str, key: &[u8]| DevIdentity { chain: chain.to_owned(), key: Secret::new(key) };
    for (identity, field) in [
        (garbage("garbage", first.server.key.expose()), "credentials.chain"),
        (garbage(&first.server.chain, b""), "credentials.key"),
        (garbage(&second.server.chain, first.server.key.expose()), "credentials.key"),
    ] {
        files.write(&identity);
        assert_eq!(server.reload().unwrap_err().field(), Some(field));
        connect(&server, &first.authority).unwrap();
    }
    std::fs::remove_file(files.folder.path().join("key.pem")).unwrap();
    let error = server.reload().unwrap_err();
    assert_eq!(error.field(), Some("credentials.key"));
    assert!(error.message().contains("key.pem"), "{error}");
    files.write(&second.server);
    assert!(server.reload().unwrap());
    connect(&server, &second.authority).unwrap();
}

#[test]
fn a_key_of_another_certificate_is_told_with_both_files() {
    let (first, second) = (certificates(), other());
    let files = Files::new(&first.server);
    let server = TlsConfig::new(&files.options()).unwrap();
    files.write(&DevIdentity { chain: second.server.chain.clone(), ..first.server.clone() });
    let error = server.reload().unwrap_err();
    for name in ["chain.pem", "key.pem"] {
        assert!(error.message().contains(files.folder.path().join(name).to_str().unwrap()), "{error}");
    }
}

#[test]
fn a_pre_shared_keys_file_is_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("key");
    let options = |key: Material| TlsOptions {
        credentials: Credentials::Psk {
            identities: vec![PskIdentity { identity: b"x".to_vec(), key }],
            hash: PskHash::Sha256,
        },
        ..TlsOptions::default()
    };
    std::fs::write(&path, [7; 32]).unwrap();
    let server = TlsConfig::new(&options(Material::read(&path, "key").unwrap())).unwrap();
    assert_eq!(server.files(), std::slice::from_ref(&path));
    let fits = |key: &[u8]| {
        let client = TlsConfig::new(&options(key.to_vec().into())).unwrap();
        let client = client.engine(&Role::Client { server_name: None }).unwrap();
        EnginePair::new(client, server.engine(&Role::Server).unwrap()).shake_hands().is_ok()
    };
    assert!(fits(&[7; 32]) && !server.reload().unwrap());
    for (content, key) in
        [("0a".repeat(32) + "\n", vec![10; 32]), ("no digits, but 16".into(), b"no digits, but 16".to_vec())]
    {
        std::fs::write(&path, &content).unwrap();
        assert!(server.reload().unwrap());
        assert!(fits(&key) && !fits(&[7; 32]), "{content}");
    }
    for content in ["0a".repeat(32) + "0", "0a".to_owned()] {
        std::fs::write(&path, content).unwrap();
        let error = server.reload().unwrap_err();
        assert_eq!(error.field(), Some("credentials.identities.x"));
        assert!(error.message().starts_with(path.to_str().unwrap()), "{error}");
        assert!(fits(b"no digits, but 16"));
    }
}

#[test]
fn sessions_of_the_old_files_are_not_resumed() {
    let (first, second) = (certificates(), other());
    let files = Files::new(&first.server);
    let server = TlsConfig::new(&files.options()).unwrap();
    let both = format!("{}{}", first.authority, second.authority).into_bytes();
    let client =
        TlsConfig::new(&TlsOptions { roots: Roots::Own(both.into()), ..TlsOptions::default() }).unwrap();
    let resumed = || {
        let mut pair =
            EnginePair::new(client.engine(&role()).unwrap(), server.engine(&Role::Server).unwrap());
        pair.shake_hands().map_err(|(_, error)| error).unwrap();
        pair.deliver();
        open_all(&mut pair.client).unwrap();
        pair.server.info.as_ref().unwrap().resumed
    };
    assert!(!resumed());
    assert!(resumed());
    files.write(&second.server);
    assert!(server.reload().unwrap());
    assert!(!resumed());
    assert!(resumed());
}

#[test]
fn a_watch_reloads_by_itself_and_says_why_not() {
    let (first, second) = (certificates(), other());
    let files = Files::new(&first.server);
    let server = Arc::new(TlsConfig::new(&files.options()).unwrap());
    let (tell, told) = mpsc::channel();
    let watch = Watch::start(Arc::clone(&server), move |result| tell.send(result).unwrap()).unwrap();
    let heard = || told.recv_timeout(DEADLINE).expect("the watch says something");
    // Where this thread is held up between a certificate and its key, the watch says that they do not fit.
    let reloaded = || while heard().is_err() {};
    files.write(&second.server);
    reloaded();
    connect(&server, &second.authority).unwrap();
    files.write(&DevIdentity { chain: "garbage".to_owned(), ..first.server.clone() });
    assert_eq!(heard().unwrap_err().field(), Some("credentials.chain"));
    connect(&server, &second.authority).unwrap();
    // A whole new file in the place of the old one, as tools that renew certificates do it.
    let folder = files.folder.path();
    std::fs::write(folder.join("new"), &first.server.chain).unwrap();
    std::fs::rename(folder.join("new"), folder.join("chain.pem")).unwrap();
    reloaded();
    connect(&server, &first.authority).unwrap();
    drop(watch);
    // Its thread has gone, and what it told into with it.
    assert_eq!(told.recv_timeout(DEADLINE).err(), Some(mpsc::RecvTimeoutError::Disconnected));
    let bytes = TlsConfig::new(&server_options()).unwrap();
    assert_eq!(Watch::start(Arc::new(bytes), |_| ()).err().unwrap().field(), Some("credentials"));
}

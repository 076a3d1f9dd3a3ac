//! The client of a bench: completions over HTTP/1.1, one connection for each request in flight, kept open for the next.
//! Enters: a server's address and bodies. Leaves: answers with their times, or what went wrong. Nothing is sent twice
//! but what a closed connection did not take.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue, RETRY_AFTER};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::events::{Answer, Listener};

/// What is read of an answer that is no stream.
const ANSWER_BYTES_MAX: usize = 1 << 20;
/// Bytes of a server's words that a message shows.
const WORDS_BYTES_MAX: usize = 300;

/// Why a request has no figures.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Failure {
    /// There was no connection, or it broke before an answer began.
    #[error("no answer: {0}")]
    Connection(String),
    #[error("status {status}: {message}")]
    Status { status: u16, message: String, retry_after: Option<Duration> },
    #[error("the stream broke off after {events} events: {how}")]
    Cut { events: usize, how: String },
    /// The server said so, in the stream.
    #[error("an event told of an error: {0}")]
    Told(String),
    #[error("not what OpenAI's API sends: {0}")]
    Malformed(String),
    #[error("{tokens} tokens, and {wanted} were asked for")]
    Length { tokens: u64, wanted: u32 },
    #[error("nothing came for {0:?}")]
    Silence(Duration),
}

impl Failure {
    /// What failures are counted by.
    pub fn kind(&self) -> String {
        match self {
            Failure::Connection(_) => "connection".into(),
            Failure::Status { status, .. } => format!("status {status}"),
            Failure::Cut { .. } => "cut stream".into(),
            Failure::Told(_) => "error event".into(),
            Failure::Malformed(_) => "malformed".into(),
            Failure::Length { .. } => "other length".into(),
            Failure::Silence(_) => "silence".into(),
        }
    }
}

/// Where requests go.
#[derive(Clone, Debug)]
pub struct Server {
    host: String,
    port: u16,
    /// As the Host header has it.
    authority: HeaderValue,
    /// Before `/v1/…`.
    path: String,
    authorization: Option<HeaderValue>,
}

impl Server {
    /// `http://HOST:PORT`, perhaps with a path in front of the API's, and a key.
    pub fn parse(url: &str, key: Option<&str>) -> Result<Server, String> {
        let uri: Uri = url.parse().map_err(|e| format!("--url {url} is no address: {e}"))?;
        if uri.scheme_str() != Some("http") {
            return Err(format!(
                "--url {url}: a bench speaks plain http; give an address such as http://127.0.0.1:8000"
            ));
        }
        let authority = uri.authority().expect("an address with a scheme has a host");
        let header = |text: &str| HeaderValue::from_str(text);
        let authorization = key.map(|key| header(&format!("Bearer {key}"))).transpose();
        Ok(Server {
            // An IPv6 address loses its brackets.
            host: authority.host().trim_matches(['[', ']']).to_owned(),
            port: authority.port_u16().unwrap_or(80),
            authority: header(authority.as_str()).map_err(|e| format!("--url {url}: {e}"))?,
            path: uri.path().trim_end_matches('/').trim_end_matches("/v1").to_owned(),
            authorization: authorization.map_err(|e| format!("the API key is no header: {e}"))?,
        })
    }

    fn request(&self, method: Method, path: &str, body: Bytes) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = format!("{}{path}", self.path).parse().expect("a path of ours");
        let headers = request.headers_mut();
        headers.insert(HOST, self.authority.clone());
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(authorization) = &self.authorization {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        request
    }
}

type Sender = SendRequest<Full<Bytes>>;

/// The connections to one server.
pub struct Client {
    server: Server,
    /// Those that no request uses now.
    idle: Mutex<Vec<Sender>>,
    /// A server that says nothing for so long has failed.
    silence_max: Duration,
}

#[derive(Deserialize)]
struct Models {
    data: Vec<Model>,
}

#[derive(Deserialize)]
struct Model {
    id: String,
}

impl Client {
    pub fn new(server: Server, silence_max: Duration) -> Client {
        Client { server, idle: Mutex::default(), silence_max }
    }

    /// The first model that the server lists.
    pub async fn model(&self) -> Result<String, Failure> {
        let request = self.server.request(Method::GET, "/v1/models", Bytes::new());
        let (sender, response) = self.send(request).await?;
        let (status, headers) = (response.status(), response.headers().clone());
        let body = self.whole(response.into_body()).await?;
        self.keep(sender);
        if status != StatusCode::OK {
            return Err(refused(status, headers.get(RETRY_AFTER), &body));
        }
        let models: Models = serde_json::from_slice(&body)
            .map_err(|error| Failure::Malformed(format!("/v1/models: {error}")))?;
        let first = models.data.into_iter().next();
        let first = first.ok_or_else(|| Failure::Malformed("/v1/models lists no model".into()))?;
        Ok(first.id)
    }

    /// Sends a body to /v1/completions, which streams an answer of `wanted` tokens. Time begins before a connection is
    /// made or taken.
    pub async fn complete(&self, body: Bytes, wanted: u32) -> Result<Answer, Failure> {
        let begun = Instant::now();
        let request = self.server.request(Method::POST, "/v1/completions", body);
        let (sender, response) = self.send(request).await?;
        if response.status() != StatusCode::OK {
            let (status, headers) = (response.status(), response.headers().clone());
            let body = self.whole(response.into_body()).await?;
            self.keep(sender);
            return Err(refused(status, headers.get(RETRY_AFTER), &body));
        }
        let mut listener = Listener::default();
        let mut frames = response.into_body();
        while let Some(frame) = self.in_time(frames.frame()).await? {
            let frame = frame.map_err(|error| Failure::Cut {
                events: listener.events(),
                how: with_cause(&error),
            })?;
            if let Ok(bytes) = frame.into_data() {
                listener.take(&bytes, begun.elapsed())?;
            }
        }
        let answer = listener.finish(wanted)?;
        self.keep(sender);
        Ok(answer)
    }

    /// A connection that was closed while nobody used it took nothing; then another is tried.
    async fn send(
        &self,
        mut request: Request<Full<Bytes>>,
    ) -> Result<(Sender, Response<Incoming>), Failure> {
        loop {
            let (mut sender, is_new) = self.connection().await?;
            match self.in_time(sender.try_send_request(request)).await? {
                Ok(response) => return Ok((sender, response)),
                Err(mut error) => match error.take_message() {
                    Some(untouched) if !is_new => request = untouched,
                    _ => return Err(Failure::Connection(with_cause(error.error()))),
                },
            }
        }
    }

    /// An idle connection, or a new one.
    async fn connection(&self) -> Result<(Sender, bool), Failure> {
        while let Some(mut sender) = self.idle() {
            if sender.ready().await.is_ok() {
                return Ok((sender, false));
            }
        }
        let Server { host, port, .. } = &self.server;
        let failed = |error: &dyn std::error::Error| Failure::Connection(with_cause(error));
        let stream = self.in_time(TcpStream::connect((host.as_str(), *port))).await?;
        let stream = stream.map_err(|error| failed(&error))?;
        stream.set_nodelay(true).map_err(|error| failed(&error))?;
        let (sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| failed(&error))?;
        // Its errors reach the request that uses it.
        tokio::spawn(connection);
        Ok((sender, true))
    }

    fn idle(&self) -> Option<Sender> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    fn keep(&self, sender: Sender) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
    }

    async fn whole(&self, body: Incoming) -> Result<Bytes, Failure> {
        let body = self.in_time(Limited::new(body, ANSWER_BYTES_MAX).collect()).await?;
        let body = body.map_err(|error| Failure::Cut { events: 0, how: error.to_string() })?;
        Ok(body.to_bytes())
    }

    async fn in_time<T>(&self, work: impl Future<Output = T>) -> Result<T, Failure> {
        timeout(self.silence_max, work).await.map_err(|_| Failure::Silence(self.silence_max))
    }
}

/// OpenAI's error if the body is one, or else its beginning.
fn refused(status: StatusCode, retry_after: Option<&HeaderValue>, body: &[u8]) -> Failure {
    #[derive(Deserialize)]
    struct Refusal {
        error: Words,
    }
    #[derive(Deserialize)]
    struct Words {
        message: String,
    }
    let told = serde_json::from_slice(body).map(|Refusal { error }| error.message);
    let mut message = told.unwrap_or_else(|_| String::from_utf8_lossy(body).into_owned());
    let end =
        (0..=WORDS_BYTES_MAX.min(message.len())).rev().find(|&at| message.is_char_boundary(at));
    message.truncate(end.unwrap_or(0));
    let seconds = retry_after.and_then(|value| value.to_str().ok()?.trim().parse().ok());
    Failure::Status {
        status: status.as_u16(),
        message,
        retry_after: seconds.map(Duration::from_secs),
    }
}

/// An error with those that caused it: hyper's own words are general.
fn with_cause(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_may_have_a_path_and_end_in_the_apis_own() {
        let of = |url| Server::parse(url, None).map(|s| (s.host, s.port, s.path));
        assert_eq!(of("http://h:81"), Ok(("h".into(), 81, "".into())));
        assert_eq!(of("http://h/"), Ok(("h".into(), 80, "".into())));
        assert_eq!(of("http://h:81/v1/"), Ok(("h".into(), 81, "".into())));
        assert_eq!(of("http://[::1]:81/llm"), Ok(("::1".into(), 81, "/llm".into())));
    }

    #[test]
    fn what_is_no_plain_address_is_refused_with_one_that_is() {
        for url in ["https://h", "h:81", "", "http://"] {
            let error = Server::parse(url, None).unwrap_err();
            assert!(error.contains("--url"), "{error}");
        }
        assert!(Server::parse("http://h", Some("two\nlines")).unwrap_err().contains("API key"));
    }

    #[test]
    fn a_refusal_tells_the_servers_words_and_when_to_come_again() {
        let seconds = HeaderValue::from_static("3");
        let body = br#"{"error":{"message":"the queue is full","type":"rate_limit_error"}}"#;
        let failure = refused(StatusCode::TOO_MANY_REQUESTS, Some(&seconds), body);
        assert_eq!(failure.to_string(), "status 429: the queue is full");
        assert_eq!(failure.kind(), "status 429");
        let Failure::Status { retry_after, .. } = failure else { panic!("{failure}") };
        assert_eq!(retry_after, Some(Duration::from_secs(3)));
        let long = refused(StatusCode::BAD_GATEWAY, None, "é".repeat(999).as_bytes());
        assert!(long.to_string().len() < WORDS_BYTES_MAX + 20, "{long}");
    }
}

//! A small HTTP/1.1 client for tests that care about connections: one value is one connection.
//!
//! In: a connected socket and requests. Out: answers, with streamed bodies piece by piece as they
//! arrive. Never retries, pools or follows anything: what a server does to a connection is what the
//! test sees.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// Longest silence of a server before a request counts as lost.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// One open connection.
pub struct Connection {
    stream: BufReader<TcpStream>,
    host: String,
    open: bool,
}

/// A whole answer.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    /// The first header of that name, in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(held, _)| held == name).map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Result<Value> {
        serde_json::from_slice(&self.body).with_context(|| format!("not JSON: {}", self.text()))
    }

    /// The `data:` payloads of a body of server-sent events, without the final `[DONE]`; an error
    /// when that is missing.
    pub fn events(&self) -> Result<Vec<Value>> {
        let text = self.text();
        let mut payloads: Vec<&str> =
            text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        if payloads.pop() != Some("[DONE]") {
            bail!("the stream does not end with [DONE]: {text}");
        }
        payloads.into_iter().map(|payload| Ok(serde_json::from_str(payload)?)).collect()
    }
}

impl Connection {
    /// Connects from the network of the calling thread.
    pub fn open(address: SocketAddr) -> Result<Connection> {
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(SILENCE_MAX))?;
        stream.set_nodelay(true)?;
        Ok(Connection { stream: BufReader::new(stream), host: address.to_string(), open: true })
    }

    /// Whether the server left the connection open for another request.
    pub fn is_open(&self) -> bool {
        self.open
    }

    pub fn get(&mut self, path: &str) -> Result<Answer> {
        self.request("GET", path, None, &mut |_| ())
    }

    pub fn post(&mut self, path: &str, body: &Value) -> Result<Answer> {
        self.request("POST", path, Some(body), &mut |_| ())
    }

    /// Sends a request and calls `piece` with every part of the body when it arrives.
    pub fn request(
        &mut self,
        method: &str,
        path: &str,
        body: Option<&Value>,
        piece: &mut dyn FnMut(&[u8]),
    ) -> Result<Answer> {
        let content = body.map(Value::to_string).unwrap_or_default();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{content}",
            self.host,
            content.len()
        );
        self.stream.get_mut().write_all(request.as_bytes())?;
        let status = self.status()?;
        let headers = self.headers()?;
        let mut answer = Answer { status, headers, body: Vec::new() };
        self.body(&mut answer, piece)?;
        if answer.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close")) {
            self.open = false;
        }
        Ok(answer)
    }

    fn status(&mut self) -> Result<u16> {
        let line = self.line().context("no answer")?;
        let word = line.split(' ').nth(1).with_context(|| format!("no status in {line:?}"))?;
        Ok(word.parse()?)
    }

    fn headers(&mut self) -> Result<Vec<(String, String)>> {
        let mut headers = Vec::new();
        loop {
            let line = self.line()?;
            if line.is_empty() {
                return Ok(headers);
            }
            let (name, value) = line.split_once(':').context("a header has a colon")?;
            headers.push((name.to_ascii_lowercase(), value.trim().to_string()));
        }
    }

    fn body(&mut self, answer: &mut Answer, piece: &mut dyn FnMut(&[u8])) -> Result<()> {
        if answer.header("transfer-encoding") == Some("chunked") {
            return self.chunks(answer, piece);
        }
        let length: u64 = match answer.header("content-length") {
            Some(length) => length.parse()?,
            None => bail!("an answer without a length: {:?}", answer.headers),
        };
        (&mut self.stream).take(length).read_to_end(&mut answer.body)?;
        if (answer.body.len() as u64) < length {
            bail!("the body ended after {} of {length} bytes", answer.body.len());
        }
        piece(&answer.body);
        Ok(())
    }

    fn chunks(&mut self, answer: &mut Answer, piece: &mut dyn FnMut(&[u8])) -> Result<()> {
        loop {
            let size = usize::from_str_radix(&self.line()?, 16).context("a chunk's size")?;
            let mut chunk = vec![0; size];
            self.stream.read_exact(&mut chunk)?;
            let end = self.line()?;
            if !end.is_empty() {
                bail!("a chunk ends with {end:?}");
            }
            if size == 0 {
                return Ok(());
            }
            piece(&chunk);
            answer.body.extend_from_slice(&chunk);
        }
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            self.open = false;
            bail!("the server closed the connection");
        }
        Ok(line.trim_end().to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// Answers one request with these bytes.
    fn serve(bytes: &'static str) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let _ = stream.read(&mut request).unwrap();
            stream.write_all(bytes.as_bytes()).unwrap();
        });
        address
    }

    #[test]
    fn events_come_piece_by_piece_and_must_end() {
        let address = serve(
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\
             d\r\ndata: {\"a\":1}\r\n2\r\n\n\n\r\n10\r\ndata: [DONE]\n\n\r\n\r\n0\r\n\r\n",
        );
        let mut pieces = 0;
        let mut connection = Connection::open(address).unwrap();
        let answer = connection.request("GET", "/", None, &mut |_| pieces += 1).unwrap();
        assert_eq!(pieces, 3);
        assert_eq!(answer.events().unwrap(), [serde_json::json!({"a": 1})]);
        assert!(connection.is_open());
        let cut = Answer { body: b"data: {}\n\n".to_vec(), ..answer };
        assert!(cut.events().is_err());
    }

    #[test]
    fn a_short_body_is_an_error_and_close_is_noticed() {
        let short = serve("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc");
        assert!(Connection::open(short).unwrap().get("/").is_err());
        let last = serve("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc");
        let mut connection = Connection::open(last).unwrap();
        assert_eq!(connection.get("/").unwrap().text(), "abc");
        assert!(!connection.is_open());
    }
}

//! A server in this process with a byte-level tokenizer and a scripted model, and a client that shows raw responses.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use axum::body::{Body, Bytes};
use http_body_util::BodyExt;
use hyper::client::conn::http1::SendRequest;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use plimsoll_engine::admission::ModelLimits;
use plimsoll_engine::backend::scripted::{Script, ScriptedBackend};
use plimsoll_engine::batch::StepNumber;
use plimsoll_engine::chat_template::{ChatTemplate, SpecialTokens};
use plimsoll_engine::http::auth::ApiKeys;
use plimsoll_engine::http::connections::ConnectionLimits;
use plimsoll_engine::http::{App, Served};
use plimsoll_engine::metrics::Metrics;
use plimsoll_engine::serve::Server;
use plimsoll_engine::step::{self, Limits, PulseLimits};
use plimsoll_engine::tokenizer::Tokenizer;
use serde_json::{Value, json};
use tokio::net::{TcpSocket, TcpStream};

pub const MODEL: &str = "scripted";
/// 256 bytes, BOS, the end of a turn, and ids without a token up to here.
pub const VOCABULARY: u32 = 320;
pub const END_OF_TURN: u32 = 257;
const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";

#[derive(Clone)]
pub struct Options {
    pub pages: u32,
    pub waiting_max: usize,
    pub step_time: Duration,
    pub keys: Option<PathBuf>,
    pub connections: ConnectionLimits,
    /// What the system takes of an answer before its client does; much, if not said.
    pub send_buffer_bytes: Option<u32>,
    pub template: bool,
    pub failing_steps: BTreeSet<StepNumber>,
    pub body_time_max: Duration,
    pub late_body_time_max: Duration,
    pub pulse_limits: PulseLimits,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            pages: 256,
            waiting_max: 256,
            step_time: Duration::ZERO,
            keys: None,
            connections: ConnectionLimits::default(),
            send_buffer_bytes: None,
            template: true,
            failing_steps: BTreeSet::new(),
            body_time_max: Duration::from_secs(30),
            late_body_time_max: Duration::from_secs(5),
            pulse_limits: PulseLimits::default(),
        }
    }
}

pub struct World {
    pub address: SocketAddr,
    pub app: Arc<App>,
    pub server: Server,
}

/// A server with its model loaded.
pub async fn world(options: Options) -> World {
    let world = loading_world(&options).await;
    world.app.serve(served(&options));
    world
}

/// A server that still waits for its model.
pub async fn loading_world(options: &Options) -> World {
    let socket = TcpSocket::new_v4().unwrap();
    if let Some(bytes) = options.send_buffer_bytes {
        socket.set_send_buffer_size(bytes).unwrap();
    }
    socket.bind(([127, 0, 0, 1], 0).into()).unwrap();
    let listener = socket.listen(1024).unwrap();
    let address = listener.local_addr().unwrap();
    let keys = options.keys.as_deref().map(|path| ApiKeys::open(path).unwrap());
    let mut app = App::new(MODEL.into(), keys);
    app.body_time_max = options.body_time_max;
    app.late_body_time_max = options.late_body_time_max;
    app.pulse_limits = options.pulse_limits;
    let app = Arc::new(app);
    let server = Server::start(listener, app.clone(), options.connections);
    World { address, app, server }
}

pub fn served(options: &Options) -> Served {
    let metrics = Metrics::new(MODEL, 2048);
    let kv_pages = vec![options.pages];
    let script = Script {
        vocabulary: VOCABULARY,
        step_time: options.step_time,
        failing_steps: options.failing_steps.clone(),
        ..Script::default()
    };
    let backend = ScriptedBackend::new(&kv_pages, script);
    let limits = Limits {
        running_max: 32,
        waiting_max: options.waiting_max,
        step_tokens_max: 512,
        context_tokens: 2048,
        kv_pages,
        steps_in_flight: 1,
        prefix_reuse: true,
    };
    let special = SpecialTokens { bos: Some("<s>".into()), ..SpecialTokens::default() };
    Served {
        name: MODEL.into(),
        tokenizer: Arc::new(tokenizer()),
        template: options.template.then(|| ChatTemplate::compile(TEMPLATE, special).unwrap()),
        limits: ModelLimits {
            context_tokens: 2048,
            kv_tokens: u64::from(options.pages) * 64,
            vocabulary: VOCABULARY,
            eos: Arc::new([END_OF_TURN].into()),
        },
        engine: step::start(Box::new(backend), limits, metrics.clone()),
        metrics,
    }
}

/// GPT-2's byte alphabet, in which printable Latin-1 stands for itself and the rest follows from U+0100 on.
fn tokenizer() -> Tokenizer {
    static MADE: AtomicU32 = AtomicU32::new(0);
    let printable = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut moved = 0x100..;
    let chars = (0..256u32).map(|b| if printable(b) { b } else { moved.next().unwrap() });
    let vocab: serde_json::Map<String, Value> = chars
        .enumerate()
        .map(|(id, c)| (char::from_u32(c).unwrap().to_string(), Value::from(id)))
        .collect();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
    };
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let json = json!({
        "version": "1.0",
        "added_tokens": [special(256, "<s>"), special(END_OF_TURN, "<end>")],
        "pre_tokenizer": level, "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    let made = MADE.fetch_add(1, Ordering::Relaxed);
    let dir = std::env::temp_dir().join(format!("plimsoll-http-{}-{made}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("tokenizer.json"), json.to_string()).unwrap();
    let tokenizer = Tokenizer::open(&dir).unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    tokenizer
}

/// One connection, kept open between requests as a client's pool does.
pub struct Client {
    address: SocketAddr,
    sender: SendRequest<Body>,
}

pub struct Answer {
    pub status: StatusCode,
    pub response: Response<()>,
    pub body: Bytes,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.body)))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.response.headers().get(name).map(|value| value.to_str().unwrap())
    }

    /// The events of a stream, without the final `[DONE]`.
    pub fn events(&self) -> Vec<Value> {
        let text = std::str::from_utf8(&self.body).unwrap();
        assert!(text.ends_with("\n\n"), "{text}");
        let mut data: Vec<&str> = text
            .trim_end()
            .split("\n\n")
            .map(|event| event.strip_prefix("data: ").expect("only data lines"))
            .collect();
        assert_eq!(data.pop(), Some("[DONE]"));
        data.iter().map(|json| serde_json::from_str(json).unwrap()).collect()
    }
}

impl Client {
    pub async fn connect(address: SocketAddr) -> std::io::Result<Client> {
        let stream = TcpStream::connect(address).await?;
        let (sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Ok(Client { address, sender })
    }

    pub async fn send(&mut self, request: Request<Body>) -> hyper::Result<Answer> {
        self.sender.ready().await?;
        let response = self.sender.send_request(request).await?;
        let (parts, body) = response.into_parts();
        let body = body.collect().await?.to_bytes();
        Ok(Answer { status: parts.status, response: Response::from_parts(parts, ()), body })
    }

    /// The server has ended it.
    pub fn is_closed(&mut self) -> bool {
        self.sender.is_closed()
    }

    pub async fn get(&mut self, path: &str) -> Answer {
        self.send(self.request("GET", path, Body::empty())).await.unwrap()
    }

    pub async fn post(&mut self, path: &str, body: &Value) -> Answer {
        self.try_post(path, body).await.unwrap()
    }

    pub async fn try_post(&mut self, path: &str, body: &Value) -> hyper::Result<Answer> {
        self.send(self.request("POST", path, body.to_string().into())).await
    }

    pub fn request(&self, method: &str, path: &str, body: Body) -> Request<Body> {
        Request::builder()
            .method(method)
            .uri(path)
            .header("host", self.address.to_string())
            .header("content-type", "application/json")
            .body(body)
            .unwrap()
    }
}

/// One request over a connection of its own.
pub async fn post(world: &World, path: &str, body: &Value) -> Answer {
    Client::connect(world.address).await.unwrap().post(path, body).await
}

pub async fn get(world: &World, path: &str) -> Answer {
    Client::connect(world.address).await.unwrap().get(path).await
}

pub fn chat(text: &str, more: Value) -> Value {
    let mut body = json!({"model": MODEL, "messages": [{"role": "user", "content": text}]});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

pub fn completion(prompt: Value, more: Value) -> Value {
    let mut body = json!({"model": MODEL, "prompt": prompt});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// Waits until nothing runs, nothing waits and every page is free, as the engine and its metrics say.
pub async fn assert_all_free(world: &World) {
    let engine = &world.app.served().unwrap().engine;
    for _ in 0..200 {
        let state = engine.state();
        if state.running == 0 && state.waiting == 0 && state.kv_pages_free == state.kv_pages_total {
            let metrics = String::from_utf8(get(world, "/metrics").await.body.to_vec()).unwrap();
            for gauge in [
                "vllm:num_requests_running",
                "vllm:num_requests_waiting",
                "vllm:kv_cache_usage_perc",
            ] {
                let line =
                    metrics.lines().find(|line| line.starts_with(&format!("{gauge}{{"))).unwrap();
                assert!(line.ends_with(" 0"), "{line}");
            }
            return;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("the engine still holds {:?}", engine.state());
}

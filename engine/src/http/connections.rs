//! The server's sockets. Enters: a listener. Leaves: requests to the router, answers to clients. Bounds what a client
//! may hold: the number of connections, the time for a request's head, the time of doing nothing, and the time of not
//! reading an answer, also of reading it a byte now and then. When all seats are taken, a newcomer gets that of the
//! longest idle. Bodies and requests have their own bounds; here nothing is known of them.

mod seats;

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::{HeaderValue, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::http::connections::seats::{Activities, Activity, Phase, Seat, Seats};
use crate::http::errors::ApiError;

/// Bounds of the server's sockets.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionLimits {
    pub connections_max: usize,
    /// From a request's first byte to the end of its head.
    pub head_time_max: Duration,
    /// Between requests; longer than common clients pool a connection, so that they and not we close it.
    pub idle_time_max: Duration,
    /// Where all seats are taken, a connection that has been idle for this long gives way to a newcomer.
    pub idle_time_min: Duration,
    /// For a client to take the next byte of an answer; one that stopped reading loses its request.
    pub write_time_max: Duration,
    /// Bytes a second at which an answer that leaves as a whole is taken, `write_time_max` aside: it is held until then.
    pub answer_rate_min: u32,
}

impl Default for ConnectionLimits {
    fn default() -> ConnectionLimits {
        ConnectionLimits {
            connections_max: 4096,
            head_time_max: Duration::from_secs(10),
            idle_time_max: Duration::from_secs(120),
            idle_time_min: Duration::from_secs(1),
            write_time_max: Duration::from_secs(60),
            answer_rate_min: 64 << 10,
        }
    }
}

/// Connections above the limit that still get an answer: probes theirs, requests a 503.
const SPARE_CONNECTIONS_MAX: usize = 64;
/// Those are for who knows what it wants: time to ask for it, or to take the answer.
const SPARE_TIME_MAX: Duration = Duration::from_secs(1);
/// Bytes of a request's head; 4,096 connections hold no more than 64 MiB of them.
const HEAD_BYTES_MAX: usize = 16 << 10;
const HEADERS_MAX: usize = 128;
/// Pause after a failed accept (no file descriptors left, say), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A request that has reached the socket by the end of the grace is read, also from a connection that was idle.
const LAST_WORDS: Duration = Duration::from_millis(50);

/// Accepts until `closing` turns true; then closes idle connections, lets the others finish their answer, and returns
/// when none is left.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    limits: ConnectionLimits,
    mut closing: watch::Receiver<bool>,
) {
    let regular = Seats::new(limits.connections_max);
    let spare = Seats::new(SPARE_CONNECTIONS_MAX);
    let spare_limits = ConnectionLimits {
        head_time_max: limits.head_time_max.min(SPARE_TIME_MAX),
        idle_time_max: limits.idle_time_max.min(SPARE_TIME_MAX),
        write_time_max: limits.write_time_max.min(SPARE_TIME_MAX),
        ..limits
    };
    let refusing = router.clone().layer(middleware::from_fn(refuse_api));
    let mut stop = closing.clone();
    let mut stopped = pin!(stop.wait_for(|closing| *closing));
    loop {
        let stream = tokio::select! {
            // Whoever connected before the end could not know of it.
            biased;
            accepted = accept(&listener) => accepted,
            _ = &mut stopped => break,
        };
        let (seat, router, limits) = match regular.take_or_vacate(limits.idle_time_min).await {
            Some(seat) => (seat, router.clone(), limits),
            None => match spare.take_or_vacate(Duration::ZERO).await {
                Some(seat) => (seat, refusing.clone(), spare_limits),
                None => continue,
            },
        };
        tokio::spawn(connection(stream, router, limits, closing.clone(), seat));
    }
    drop(listener);
    // Whoever holds the sender waits for this function no longer than it wants to.
    regular.all_free().await;
    spare.all_free().await;
    closing.mark_unchanged();
}

async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _peer)) => {
                let _peer: SocketAddr = _peer;
                // Tokens are small and each should leave at once; a socket that refuses the option still works.
                let _ = stream.set_nodelay(true);
                return stream;
            }
            Err(error) => {
                tracing::warn!(%error, "failed to accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// For connections above the limit: probes are answered, all else is sent away.
async fn refuse_api(request: Request, next: Next) -> Response {
    let mut response = match request.uri().path() {
        "/health" | "/ready" | "/metrics" => next.run(request).await,
        _ => ApiError::unavailable("too many connections are open; retry shortly", 1)
            .code("too_many_connections")
            .into_response(),
    };
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

impl Activity {
    /// When the connection will have been at it for too long, and what to call that.
    fn deadline(self, limits: ConnectionLimits) -> Option<(Instant, &'static str)> {
        if let Some(since) = self.unread_since {
            let next_byte = (since + limits.write_time_max, "the client does not read its answer");
            let all = self.taken_by.map(|by| (by, "the client reads its answer too slowly"));
            return all.into_iter().chain([next_byte]).min();
        }
        match self.phase {
            Phase::Idle(since) => Some((since + limits.idle_time_max, "nothing was asked")),
            Phase::Head(since) => Some((since + limits.head_time_max, "a head came too slowly")),
            Phase::Busy => None,
            Phase::Leaving(since) => Some((since, "its seat was wanted")),
        }
    }

    /// An answer begins, of so many bytes if it leaves as a whole.
    fn answer(&mut self, bytes: Option<u64>, limits: ConnectionLimits) {
        let seconds = |bytes: u64| bytes as f64 / f64::from(limits.answer_rate_min);
        let time = bytes.map(|bytes| Duration::from_secs_f64(seconds(bytes)));
        self.taken_by = match (self.unread_since, self.taken_by) {
            // Behind one that is not taken yet.
            (Some(_), Some(by)) => Some(by + time.unwrap_or_default()),
            _ => time.map(|time| Instant::now() + limits.write_time_max + time),
        };
    }
}

async fn connection(
    stream: TcpStream,
    router: Router,
    limits: ConnectionLimits,
    mut closing: watch::Receiver<bool>,
    seat: Seat,
) {
    let activities = seat.activities.clone();
    let mut activity = activities.subscribe();
    let io = TokioIo::new(Watched { stream, activities: activities.clone() });
    let router = TowerToHyperService::new(router);
    let service = service_fn(|request: hyper::Request<Incoming>| {
        activities.send_modify(|activity| activity.phase = Phase::Busy);
        let answer = Answer { activities: activities.clone() };
        let response = router.call(request.map(Body::new));
        async move {
            let response = response.await?;
            let bytes = HttpBody::size_hint(response.body()).exact();
            answer.activities.send_modify(|activity| activity.answer(bytes, limits));
            Ok::<_, Infallible>(response.map(|inner| Answered { inner, _answer: answer }))
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(None)
        .max_header_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        // A head has to fit; hyper alone would read up to 400 KiB ahead.
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(io, service);
    let mut connection = pin!(connection);
    let mut leave = pin!(async {
        let _ = closing.wait_for(|closing| *closing).await;
        tokio::time::sleep(LAST_WORDS).await;
    });
    let mut told_to_close = false;
    loop {
        let expired = expired(&mut activity, limits);
        tokio::select! {
            biased;
            result = connection.as_mut() => {
                if let Err(error) = result {
                    tracing::debug!(%error, "a connection ended early");
                }
                return;
            }
            () = &mut leave, if !told_to_close => {
                told_to_close = true;
                connection.as_mut().graceful_shutdown();
            }
            why = expired => {
                tracing::debug!(why, "closing a connection");
                return;
            }
        }
    }
}

/// Returns when the connection has been at something for too long.
async fn expired(
    activity: &mut watch::Receiver<Activity>,
    limits: ConnectionLimits,
) -> &'static str {
    loop {
        let deadline = activity.borrow_and_update().deadline(limits);
        let passed = async {
            match deadline {
                Some((deadline, why)) => {
                    tokio::time::sleep_until(deadline).await;
                    why
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            why = passed => return why,
            changed = activity.changed() => {
                if changed.is_err() {
                    return "nobody answers any more";
                }
            }
        }
    }
}

/// Lives as long as an answer is owed.
struct Answer {
    activities: Activities,
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.activities.send_modify(|activity| activity.phase = Phase::Idle(Instant::now()));
    }
}

/// An answer's body; its end ends the request.
struct Answered {
    inner: Body,
    _answer: Answer,
}

impl HttpBody for Answered {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.inner).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        HttpBody::size_hint(&self.inner)
    }
}

/// A socket that notes when a request begins to arrive, and when an answer is not taken.
struct Watched {
    stream: TcpStream,
    activities: Activities,
}

impl Watched {
    fn note_write(&self, written: &Poll<io::Result<usize>>) {
        self.activities.send_if_modified(|activity| {
            let was_unread = activity.unread_since.is_some();
            if written.is_pending() == was_unread {
                return false;
            }
            let now = Instant::now();
            activity.unread_since = written.is_pending().then_some(now);
            // The end of an answer may still lie here when nothing more is owed: idling begins once it is taken.
            if let Phase::Idle(since) = &mut activity.phase {
                *since = now;
            }
            true
        });
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context,
        buffer: &mut ReadBuf,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let result = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if buffer.filled().len() > before {
            self.activities.send_if_modified(|activity| {
                let begins = matches!(activity.phase, Phase::Idle(_));
                if begins {
                    activity.phase = Phase::Head(Instant::now());
                }
                begins
            });
        }
        result
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.note_write(&result);
        result
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context,
        slices: &[io::IoSlice],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.note_write(&result);
        result
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

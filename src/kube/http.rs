//! One HTTP/1.1 request, and its answer within bounds of time and size. httparse takes the head apart; the body is as long as
//! Content-Length, the chunks or the connection say.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// Most that is read of an answer. etcd takes no object above 1.5 MiB.
const MAX_ANSWER_BYTES: usize = 2 << 20;
/// Most of it that may be its head.
const MAX_HEAD_BYTES: usize = 16 << 10;
const MAX_HEADERS: usize = 64;

/// A connection on which no read and no write waits beyond the deadline, however slowly the other side sends.
pub(super) struct Timed {
    tcp: TcpStream,
    deadline: Instant,
}

impl Timed {
    pub(super) fn new(tcp: TcpStream, deadline: Instant) -> Self {
        Self { tcp, deadline }
    }

    fn left(&self) -> io::Result<Option<Duration>> {
        // A timeout of zero would be none.
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

impl Read for Timed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.tcp.set_read_timeout(self.left()?)?;
        self.tcp.read(buffer)
    }
}

impl Write for Timed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.tcp.set_write_timeout(self.left()?)?;
        self.tcp.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.tcp.flush()
    }
}

/// Status and body.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) body: Vec<u8>,
}

/// Only metadata is asked for; an API server too old to select it (before 1.15) sends the whole pod.
const ACCEPT: &str = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1, application/json";

/// # Errors
/// Also an answer too long, or not of HTTP.
pub(super) fn get(
    stream: &mut (impl Read + Write),
    authority: &str,
    path: &str,
    token: Option<&str>,
) -> io::Result<Answer> {
    let version = env!("CARGO_PKG_VERSION");
    let authorization = token.map(|token| format!("Authorization: Bearer {token}\r\n")).unwrap_or_default();
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {authority}\r\nAccept: {ACCEPT}\r\nUser-Agent: podshaper/{version}\r\n\
         Connection: close\r\n{authorization}\r\n"
    );
    stream.write_all(request.as_bytes())?;
    stream.flush()?;
    answer(stream)
}

/// How the end of the body is told.
enum Framing {
    Length(usize),
    Chunks,
    Connection,
}

struct Head {
    bytes: usize,
    status: u16,
    framing: Framing,
}

fn answer(stream: &mut impl Read) -> io::Result<Answer> {
    let (mut received, mut buffer, mut head) = (Vec::new(), vec![0; 16 << 10], None::<Head>);
    loop {
        if head.is_none() {
            head = parse(&received)?;
        }
        if let Some(Head { bytes, status, framing }) = &head {
            let body = &received[*bytes..];
            let whole = match framing {
                Framing::Length(length) => body.get(..*length).map(<[u8]>::to_vec),
                Framing::Chunks => unchunked(body)?,
                Framing::Connection => None,
            };
            if let Some(body) = whole {
                return Ok(Answer { status: *status, body });
            }
        }
        match stream.read(&mut buffer) {
            Ok(0) => return at_end(head, received),
            Ok(read) => received.extend_from_slice(&buffer[..read]),
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
            Err(cause) => return Err(cause),
        }
        if received.len() > MAX_ANSWER_BYTES {
            return Err(invalid(format!("its answer has more than {MAX_ANSWER_BYTES} bytes")));
        }
    }
}

fn at_end(head: Option<Head>, received: Vec<u8>) -> io::Result<Answer> {
    match head {
        Some(Head { bytes, status, framing: Framing::Connection }) => {
            Ok(Answer { status, body: received[bytes..].to_vec() })
        }
        _ => Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("its answer ends after {} bytes, too early", received.len()),
        )),
    }
}

/// None as long as the head is not whole.
fn parse(received: &[u8]) -> io::Result<Option<Head>> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let window = &received[..received.len().min(MAX_HEAD_BYTES)];
    let no_http = |cause| invalid(format!("its answer is not HTTP: {cause}"));
    let bytes = match response.parse(window).map_err(no_http)? {
        httparse::Status::Complete(bytes) => bytes,
        httparse::Status::Partial if received.len() >= MAX_HEAD_BYTES => {
            return Err(invalid(format!("the head of its answer has more than {MAX_HEAD_BYTES} bytes")));
        }
        httparse::Status::Partial => return Ok(None),
    };
    let header = |name: &str| {
        response.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name)).map(|header| header.value)
    };
    let framing = match (header("transfer-encoding"), header("content-length")) {
        (Some(coding), _) if coding.eq_ignore_ascii_case(b"chunked") => Framing::Chunks,
        (Some(_), _) => return Err(invalid("its answer is coded in a way that was not asked for")),
        (None, Some(length)) => {
            let length = std::str::from_utf8(length).ok().and_then(|text| text.parse().ok());
            Framing::Length(length.filter(|length| *length <= MAX_ANSWER_BYTES).ok_or_else(|| {
                invalid(format!(
                    "its answer would be longer than {MAX_ANSWER_BYTES} bytes, or its Content-Length is no number"
                ))
            })?)
        }
        (None, None) => Framing::Connection,
    };
    Ok(Some(Head { bytes, status: response.code.unwrap_or_default(), framing }))
}

/// The chunks put together; None as long as the last one is not there. What may follow it is not looked at.
fn unchunked(mut rest: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let mut body = Vec::new();
    loop {
        let (start, length) = match httparse::parse_chunk_size(rest) {
            Ok(httparse::Status::Complete(found)) => found,
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(_) => return Err(invalid("a chunk of its answer has no length")),
        };
        if length == 0 {
            return Ok(Some(body));
        }
        let length = usize::try_from(length).ok().filter(|length| *length <= MAX_ANSWER_BYTES);
        let end = start
            + length.ok_or_else(|| invalid(format!("a chunk of its answer has more than {MAX_ANSWER_BYTES} bytes")))?;
        let Some(chunk) = rest.get(start..end) else { return Ok(None) };
        body.extend_from_slice(chunk);
        // The line break behind a chunk.
        let Some(next) = rest.get(end + 2..) else { return Ok(None) };
        rest = next;
    }
}

fn invalid(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A connection that gives its bytes one at a time.
    struct Dripping<'a>(&'a [u8]);

    impl Read for Dripping<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let Some((first, rest)) = self.0.split_first() else { return Ok(0) };
            buffer[0] = *first;
            self.0 = rest;
            Ok(1)
        }
    }

    #[test]
    fn a_body_ends_where_its_head_says() {
        for (text, expected) in [
            ("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabcdef", Ok((200, "abc"))),
            ("HTTP/1.1 404 Not Found\r\n\r\nabc", Ok((404, "abc"))),
            (
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n1\r\na\r\n0b;x=1\r\nbcdefghijkl\r\n0\r\n\r\n",
                Ok((200, "abcdefghijkl")),
            ),
            (
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
                Err("its answer ends after 55 bytes, too early"),
            ),
            (
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nabc\r\n",
                Err("a chunk of its answer has more than 2097152 bytes"),
            ),
            (
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
                Err("its answer is coded in a way that was not asked for"),
            ),
            ("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabc", Err("its answer ends after 41 bytes, too early")),
            (
                "HTTP/1.1 200 OK\r\nContent-Length: 2097153\r\n\r\n",
                Err("its answer would be longer than 2097152 bytes, or its Content-Length is no number"),
            ),
            (
                "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
                Err("its answer would be longer than 2097152 bytes, or its Content-Length is no number"),
            ),
            ("SSH-2.0-OpenSSH_9.2\r\n", Err("its answer is not HTTP: invalid HTTP version")),
            ("", Err("its answer ends after 0 bytes, too early")),
        ] {
            let found = answer(&mut Dripping(text.as_bytes()));
            let found = found
                .map(|Answer { status, body }| (status, String::from_utf8(body).unwrap()))
                .map_err(|cause| cause.to_string());
            assert_eq!(found, expected.map(|(status, body)| (status, body.to_owned())).map_err(String::from), "{text}");
        }
    }

    #[test]
    fn an_answer_without_end_is_given_up() {
        let head = b"HTTP/1.1 200 OK\r\n\r\n";
        let error = answer(&mut head.chain(io::repeat(b'x'))).unwrap_err();
        assert_eq!(error.to_string(), "its answer has more than 2097152 bytes");
        let error = answer(&mut b"HTTP/1.1 200 OK\r\nX: ".chain(io::repeat(b'x'))).unwrap_err();
        assert_eq!(error.to_string(), "the head of its answer has more than 16384 bytes");
    }

    proptest! {
        #[test]
        fn no_answer_makes_the_parser_panic(text in "(HTTP/1.1 200 OK\r\n(Transfer-Encoding: chunked|Content-Length: [0-9]{1,2})\r\n\r\n)?[0-9a-f\r\n;]{0,30}") {
            let _ = answer(&mut text.as_bytes());
        }
    }
}

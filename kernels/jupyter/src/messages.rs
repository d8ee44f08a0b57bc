//! Jupyter's messages, and the sockets that carry them.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use chrono::SubsecRound;
use jupyter_protocol::messaging::{JupyterMessage, JupyterMessageContent, UnknownMessage};
use jupyter_zmq_client::{Connection, ConnectionInfo, RawMessage};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;
use zeromq::{RouterSocket, Socket, SocketRecv, SocketSend};

/// Reads the ports and the key that Jupyter has chosen.
pub fn read_connection_file(path: &Path) -> Result<ConnectionInfo> {
    let shown = path.display();
    let remedy = "remedy: Jupyter writes this file and starts the kernel with it: jupyter lab, or \
                  jupyter console --kernel qlora-nb";
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read the connection file {shown}\n{remedy}"))?;
    let info: ConnectionInfo = serde_json::from_str(&text)
        .with_context(|| format!("{shown} is not a connection file, a JSON object with ip, ports and key\n{remedy}"))?;
    if info.signature_scheme != "hmac-sha256" {
        bail!(
            "{shown} wants the signature scheme {:?}, and only hmac-sha256 is known\n{remedy}",
            info.signature_scheme
        );
    }
    Ok(info)
}

/// Binds the socket of a channel.
pub async fn listen<S: Socket>(info: &ConnectionInfo, channel: &str, port: u16, url: &str) -> Result<Connection<S>> {
    let mut socket = S::new();
    socket.bind(url).await.with_context(|| {
        let remedy = "remedy: start it from Jupyter, which chooses free ports; another kernel may be using this one";
        format!("cannot listen at {} port {port}, the {channel} channel of the connection file\n{remedy}", info.ip)
    })?;
    // Names this kernel in the messages that it sends; no other process on this machine has both numbers.
    let session = format!("qlora-nb-{}-{}", std::process::id(), info.shell_port);
    Ok(Connection::new(socket, &info.key, &session))
}

/// A channel on which clients ask: what they send, and where answers go.
pub struct Channel {
    pub requests: UnboundedReceiver<JupyterMessage>,
    pub answers: UnboundedSender<JupyterMessage>,
    /// Ends when the last answer is sent and there is nobody to give another.
    pub sending: JoinHandle<()>,
}

impl Channel {
    pub async fn listen(info: &ConnectionInfo, channel: &str, port: u16, url: &str) -> Result<Channel> {
        let (send, receive) = listen::<RouterSocket>(info, channel, port, url).await?.split();
        let (received, requests) = unbounded_channel();
        let (answers, queue) = unbounded_channel();
        tokio::spawn(receive_all(receive, received));
        Ok(Channel { requests, answers, sending: tokio::spawn(send_all(send, queue)) })
    }
}

pub async fn send_all<S: SocketSend>(mut socket: Connection<S>, mut queue: UnboundedReceiver<JupyterMessage>) {
    while let Some(message) = queue.recv().await {
        if let Err(error) = socket.send(message).await {
            complain(&error);
        }
    }
}

async fn receive_all<S: SocketRecv>(mut socket: Connection<S>, queue: UnboundedSender<JupyterMessage>) {
    loop {
        match socket.socket.recv().await.map(|parts| received(parts, &socket)) {
            Ok(Ok(message)) => {
                if queue.send(message).is_err() {
                    return;
                }
            }
            Ok(Err(error)) => complain(&error),
            Err(error) => {
                complain(&error);
                // So that a socket that is broken for good does not keep a core busy.
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

/// A message that cannot be read or sent concerns nobody but its sender; the kernel goes on. The server's log shows it.
fn complain(error: &dyn std::fmt::Display) {
    eprintln!("qlora-nb: a message was dropped: {error}");
}

/// Contents are kept as JSON: a message with a field less than the protocol wants is not worth dropping.
pub fn message(msg_type: &str, content: Value, parent: Option<&JupyterMessage>) -> JupyterMessage {
    let content = UnknownMessage { msg_type: msg_type.to_owned(), content };
    let mut message = JupyterMessage::new(JupyterMessageContent::UnknownMessage(content), parent);
    message.header.username = "qlora-nb".to_owned();
    // jupyter_client takes a date with nanoseconds for no date.
    message.header.date = message.header.date.trunc_subsecs(6);
    message
}

pub fn reply_to(request: &JupyterMessage, content: Value) -> JupyterMessage {
    message(&request.header.msg_type.replace("_request", "_reply"), content, Some(request))
}

pub fn content(message: &JupyterMessage) -> &Value {
    match &message.content {
        JupyterMessageContent::UnknownMessage(message) => &message.content,
        _ => &Value::Null,
    }
}

/// The content as the type that the request's name promises.
pub fn parsed<T: for<'a> Deserialize<'a>>(message: &JupyterMessage) -> Result<T> {
    T::deserialize(content(message)).with_context(|| format!("a malformed {}", message.header.msg_type))
}

pub fn received<S>(parts: zeromq::ZmqMessage, connection: &Connection<S>) -> Result<JupyterMessage> {
    let raw = RawMessage::from_multipart(parts, &connection.mac)?;
    // from_multipart sees to it that there are these four.
    let [header, _, metadata, content] = [0, 1, 2, 3].map(|i| &raw.jparts[i]);
    let header: jupyter_protocol::messaging::Header = serde_json::from_slice(header)?;
    let content = UnknownMessage { msg_type: header.msg_type.clone(), content: serde_json::from_slice(content)? };
    let mut message = JupyterMessage::new(JupyterMessageContent::UnknownMessage(content), None);
    message.header = header;
    message.metadata = serde_json::from_slice(metadata)?;
    message.zmq_identities = raw.zmq_identities;
    Ok(message)
}

/// The answer to a request that makes no sense.
pub fn refusal(error: &anyhow::Error) -> Value {
    let message = format!("{error:#}");
    json!({ "status": "error", "ename": "ProtocolError", "evalue": message, "traceback": [message] })
}

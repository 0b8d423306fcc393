//! The reference for gradestore: hyper without anything else.
//!
//! The same runtime, HTTP library and socket settings as a node, and minimal responses: GET
//! returns a fixed JSON body of the length of a grade, POST reads its body and returns 204.
//!
//! `cargo run --release --example bare -- 127.0.0.1:9090`

use std::convert::Infallible;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

const GRADE: &[u8] =
    br#"{"user_id":"1000000000123","postpaid_limit":100123,"spp":23,"shipping_fee":0,"return_fee":50}"#;

async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let mut response = Response::new(Full::default());
    if request.method() == Method::POST {
        // A broken body is the client's problem.
        let _ = request.into_body().collect().await;
        *response.status_mut() = StatusCode::NO_CONTENT;
    } else {
        *response.body_mut() = Full::new(Bytes::from_static(GRADE));
        let json = http::HeaderValue::from_static("application/json");
        response
            .headers_mut()
            .insert(http::header::CONTENT_TYPE, json);
    }
    Ok(response)
}

fn main() -> std::io::Result<()> {
    let address = std::env::args()
        .nth(1)
        .unwrap_or("127.0.0.1:9090".to_owned());
    let runtime = gradestore::node::lifecycle::runtime(None)?;
    runtime.block_on(async {
        let listener = TcpListener::bind(&address).await?;
        println!("listening on http://{}", listener.local_addr()?);
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            tokio::spawn(
                http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer)),
            );
        }
    })
}

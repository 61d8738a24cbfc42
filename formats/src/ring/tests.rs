use super::*;
use crate::Buffer;

/// Runs a test on each engine.
fn each(test: impl Fn(&Ring)) {
    for engine in [Engine::IoUring, Engine::Threads] {
        let ring = Ring::new(engine).unwrap();
        assert_eq!(ring.engine(), engine);
        test(&ring);
    }
}

fn file() -> File {
    tempfile::tempfile().unwrap().into()
}

fn segments(bytes: &[u8]) -> Segments {
    let segments = Segments::from_buffer(Buffer::zeroed(bytes.len(), 1).unwrap());
    segments.copy_from(bytes);
    segments
}

#[test]
fn what_is_written_is_read() {
    each(|ring| {
        let file = file();
        ring.block_on(
            async {
                ring.write_all_at(&file, 3, segments(b"hello"))
                    .await
                    .unwrap();
                ring.fdatasync(&file).await.unwrap();
                let to = segments(&[1; 8]);
                ring.read_exact_at(&file, 0, to.clone()).await.unwrap();
                assert_eq!(*to.into_buffer().unwrap(), *b"\0\0\0hello");
            },
            || {},
        );
    });
}

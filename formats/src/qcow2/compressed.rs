//! Compressed clusters (qcow2 specification, "Compressed Clusters Descriptor"): one stream each,
//! which says itself where it ends; what follows up to the sector's end means nothing.

use std::fmt;
use std::io;

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use zstd_safe::zstd_sys::ZSTD_ErrorCode::ZSTD_error_dstSize_tooSmall;
use zstd_safe::{CCtx, DCtx, is_error_kind};

use super::Compression;

/// Other programs read streams only with a window of this size, 4 KiB.
const WINDOW_BITS: u8 = 12;

/// Decompresses clusters one after another, with the memory of the first: about 48 KiB for
/// zlib, 160 KiB for zstd, whatever the stream demands.
pub(super) struct Decoder(Decoding);

enum Decoding {
    Zlib(Box<Decompress>),
    Zstd(DCtx<'static>),
}

impl Decoder {
    pub(super) fn new(compression: Compression) -> io::Result<Decoder> {
        Ok(Decoder(match compression {
            // The largest window is accepted too.
            Compression::Zlib => Decoding::Zlib(Box::new(Decompress::new(false))),
            Compression::Zstd => {
                Decoding::Zstd(DCtx::try_create().ok_or(io::ErrorKind::OutOfMemory)?)
            }
        }))
    }

    /// Fills all of `to`, one cluster, from the sectors that hold the compressed one. An error
    /// of kind [`io::ErrorKind::InvalidData`] if they do not hold one; then `to` is undefined.
    pub(super) fn decompress(&mut self, from: &[u8], to: &mut [u8]) -> io::Result<()> {
        match &mut self.0 {
            Decoding::Zlib(decompress) => inflate(decompress, from, to),
            Decoding::Zstd(context) => unzstd(context, from, to),
        }
    }
}

fn inflate(decompress: &mut Decompress, from: &[u8], to: &mut [u8]) -> io::Result<()> {
    decompress.reset(false);
    decompress
        .decompress(from, to, FlushDecompress::Finish)
        .map_err(invalid)?;
    // Whether the stream ends here is no matter: all that is wanted of it is there.
    whole(decompress.total_out(), to)
}

fn unzstd(context: &mut DCtx<'_>, mut from: &[u8], to: &mut [u8]) -> io::Result<()> {
    // The cluster itself is the window: no memory is taken for one, however large the frame
    // says that it is. A stream may have several frames.
    let mut filled = 0;
    while filled < to.len() {
        let len = zstd_safe::find_frame_compressed_size(from).map_err(zstd_invalid)?;
        let (frame, rest) = from.split_at_checked(len).ok_or_else(|| invalid("short"))?;
        filled += context
            .decompress(&mut to[filled..], frame)
            .map_err(zstd_invalid)?;
        from = rest;
    }
    whole(filled as u64, to)
}

fn whole(filled: u64, to: &[u8]) -> io::Result<()> {
    match filled == to.len() as u64 {
        true => Ok(()),
        false => Err(invalid(format!("it ends after {filled} bytes"))),
    }
}

fn invalid(why: impl fmt::Display) -> io::Error {
    let message = format!("a compressed cluster cannot be decompressed: {why}");
    io::Error::new(io::ErrorKind::InvalidData, message)
}

fn zstd_invalid(code: usize) -> io::Error {
    invalid(zstd_safe::get_error_name(code))
}

/// Compresses clusters one after another, with the memory of the first.
pub struct Encoder(Encoding);

enum Encoding {
    Zlib(Box<Compress>),
    Zstd(CCtx<'static>),
}

impl Encoder {
    /// An error of kind [`io::ErrorKind::OutOfMemory`] if there is no memory for it.
    pub fn new(compression: Compression) -> io::Result<Encoder> {
        Ok(Encoder(match compression {
            Compression::Zlib => Encoding::Zlib(Box::new(deflate())),
            Compression::Zstd => {
                Encoding::Zstd(CCtx::try_create().ok_or(io::ErrorKind::OutOfMemory)?)
            }
        }))
    }

    /// Compresses a cluster into `to`. Returns the length, or `None` if it does not fit: then
    /// the cluster is better stored as it is.
    pub fn compress(&mut self, from: &[u8], to: &mut [u8]) -> io::Result<Option<usize>> {
        match &mut self.0 {
            Encoding::Zlib(compress) => {
                compress.reset();
                let status = compress
                    .compress(from, to, FlushCompress::Finish)
                    .map_err(io::Error::other)?;
                if matches!(status, Status::StreamEnd) {
                    return Ok(Some(compress.total_out() as usize));
                }
                // A reset of zlib-rs 0.6.8 leaves it less room for each stream that was cut off.
                **compress = deflate();
                Ok(None)
            }
            Encoding::Zstd(context) => match context.compress2(to, from) {
                Ok(len) => Ok(Some(len)),
                Err(code) if is_error_kind(code, ZSTD_error_dstSize_tooSmall) => Ok(None),
                Err(code) => Err(io::Error::other(zstd_safe::get_error_name(code))),
            },
        }
    }
}

fn deflate() -> Compress {
    Compress::new_with_window_bits(flate2::Compression::default(), false, WINDOW_BITS)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::FileExt;
    use std::process::Command;

    use super::super::Header;
    use super::super::entry::{Entry, Geometry, Mapping, OFFSET_MASK};
    use super::super::header::be64;
    use super::*;
    use crate::testing::{Random, allocations, directory};

    const BOTH: [Compression; 2] = [Compression::Zlib, Compression::Zstd];

    /// Bytes that can be compressed, but not by much.
    fn text(len: usize, seed: u64) -> Vec<u8> {
        let mut random = Random::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        (0..len).map(|_| b'a' + random.below(9) as u8).collect()
    }

    fn compressed(compression: Compression, from: &[u8]) -> Vec<u8> {
        let mut to = vec![0; from.len() + 100];
        let mut encoder = Encoder::new(compression).unwrap();
        let len = encoder.compress(from, &mut to).unwrap().unwrap();
        to.truncate(len);
        to
    }

    #[test]
    fn what_is_compressed_reads_back_whatever_follows_it() {
        for compression in BOTH {
            let mut encoder = Encoder::new(compression).unwrap();
            let mut decoder = Decoder::new(compression).unwrap();
            for (seed, bits) in (9..=21).enumerate() {
                let cluster = text(1 << bits, seed as u64);
                let mut to = vec![0xee; cluster.len()];
                let len = encoder.compress(&cluster, &mut to).unwrap().unwrap();
                assert!(len < cluster.len() * 2 / 3, "{compression:?} {bits} {len}");
                let mut back = vec![0; cluster.len()];
                for with in [len, len.next_multiple_of(512)] {
                    back.fill(0);
                    decoder.decompress(&to[..with], &mut back).unwrap();
                    assert!(back == cluster);
                }
            }
        }
    }

    #[test]
    fn clusters_that_do_not_fit_spoil_no_later_one() {
        let mut random = Random::new(6);
        for compression in BOTH {
            let mut encoder = Encoder::new(compression).unwrap();
            for _ in 0..2000 {
                let noise: Vec<u8> = (0..512).map(|_| random.below(256) as u8).collect();
                assert_eq!(encoder.compress(&noise, &mut [0; 511]).unwrap(), None);
            }
            let cluster = text(4096, 2);
            let mut to = vec![0; 4096];
            let len = encoder.compress(&cluster, &mut to).unwrap().unwrap();
            let mut back = vec![0; 4096];
            let mut decoder = Decoder::new(compression).unwrap();
            decoder.decompress(&to[..len], &mut back).unwrap();
            assert!(back == cluster);
        }
    }

    #[test]
    fn a_cluster_that_does_not_fit_is_said_not_to() {
        let mut random = Random::new(5);
        let noise: Vec<u8> = (0..65536).map(|_| random.below(256) as u8).collect();
        for compression in BOTH {
            let mut encoder = Encoder::new(compression).unwrap();
            let mut to = vec![0; noise.len() - 1];
            assert_eq!(encoder.compress(&noise, &mut to).unwrap(), None);
            let zeroes = vec![0; 65536];
            let len = encoder.compress(&zeroes, &mut to).unwrap();
            assert!(len.is_some_and(|len| len < 200));
        }
    }

    #[test]
    fn a_stream_that_is_cut_short_or_too_long_or_damaged_is_invalid_data() {
        for compression in BOTH {
            let cluster = text(65536, 7);
            let good = compressed(compression, &cluster);
            let mut decoder = Decoder::new(compression).unwrap();
            let mut back = vec![0; 65536];
            let mut refuses = |from: &[u8], len: usize| {
                let error = decoder.decompress(from, &mut back[..len]).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::InvalidData);
                assert!(error.to_string().starts_with("a compressed cluster"));
            };
            for len in [0, 1, 4, 100, good.len() / 2, good.len() - 100] {
                refuses(&good[..len], 65536);
            }
            refuses(&[0xff; 4096], 65536);
            refuses(&[0; 4096], 65536);
            refuses(&compressed(compression, &cluster[..4096]), 65536);
            // The decoder works on.
            decoder.decompress(&good, &mut back).unwrap();
            assert!(back == cluster);
            for seed in 0..2000 {
                let mut random = Random::new(seed * 7919 + 1);
                let mut bad = good.clone();
                for _ in 0..random.below(8) + 1 {
                    let at = random.below(bad.len() as u64) as usize;
                    bad[at] = random.below(256) as u8;
                }
                let _ = decoder.decompress(&bad, &mut back);
            }
        }
    }

    #[test]
    fn a_window_of_32_kib_is_accepted() {
        let mut cluster = text(40000, 3);
        // Found again only 32 KiB back.
        cluster.extend_from_within(10000..30000);
        let mut to = vec![0; cluster.len()];
        let mut compress = Compress::new(flate2::Compression::best(), false);
        compress
            .compress(&cluster, &mut to, FlushCompress::Finish)
            .unwrap();
        let mut decoder = Decoder::new(Compression::Zlib).unwrap();
        let mut back = vec![0; cluster.len()];
        decoder.decompress(&to, &mut back).unwrap();
        assert!(back == cluster);
    }

    #[test]
    fn a_zstd_stream_may_have_several_frames_and_ask_for_any_window() {
        let cluster = text(65536, 9);
        let mut stream = compressed(Compression::Zstd, &cluster[..1000]);
        // A skippable frame.
        stream.extend([0x50, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 1, 2]);
        stream.extend(compressed(Compression::Zstd, &cluster[1000..]));
        let mut back = vec![0; cluster.len()];
        let mut decoder = Decoder::new(Compression::Zstd).unwrap();
        decoder.decompress(&stream, &mut back).unwrap();
        assert!(back == cluster);
        // No content size, a window of 1 GiB, and a last block that is 512 times 0x61.
        let huge = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa0, 0x03, 0x10, 0x00, 0x61];
        let mut back = [0; 512];
        decoder.decompress(&huge, &mut back).unwrap();
        assert_eq!(back, [0x61; 512]);
    }

    #[test]
    fn a_decoder_allocates_once_for_all_clusters() {
        let cluster = text(65536, 4);
        let from = compressed(Compression::Zlib, &cluster);
        let mut decoder = Decoder::new(Compression::Zlib).unwrap();
        let mut back = vec![0; 65536];
        let before = allocations();
        for _ in 0..10 {
            decoder.decompress(&from, &mut back).unwrap();
        }
        assert_eq!(allocations(), before);
    }

    /// The first clusters of an image that QEMU compressed.
    fn clusters_of(image: &[u8], file: &File) -> Vec<Vec<u8>> {
        let header = Header::parse(&image[..65536.min(image.len())]).unwrap();
        let geometry = Geometry::of(&header);
        let mut decoder = Decoder::new(header.compression).unwrap();
        let l1 = be64(image, header.l1_table_offset as usize) & OFFSET_MASK;
        let mut clusters = Vec::new();
        for index in 0..header.size.div_ceil(header.cluster_size()) as usize {
            let descriptor = be64(image, l1 as usize + index * 8);
            let entry = Entry {
                descriptor,
                bitmap: 0,
            };
            let Ok(Mapping::Compressed { offset, len }) = entry.mapping(geometry) else {
                panic!("{descriptor:#x} is not compressed");
            };
            let there = (file.metadata().unwrap().len() - offset).min(len);
            let mut from = vec![0; there as usize];
            file.read_exact_at(&mut from, offset).unwrap();
            let mut to = vec![0; header.cluster_size() as usize];
            decoder.decompress(&from, &mut to).unwrap();
            clusters.push(to);
        }
        clusters
    }

    #[test]
    fn clusters_that_qemu_compressed_are_read() {
        let directory = directory();
        let raw = directory.path().join("a.raw");
        let contents = text(1 << 20, 11);
        fs::write(&raw, &contents).unwrap();
        for compression in ["zlib", "zstd"] {
            for cluster_size in [4096, 65536, 1 << 20] {
                let qcow2 = directory.path().join("a.qcow2");
                let options = format!("cluster_size={cluster_size},compression_type={compression}");
                let status = Command::new("qemu-img")
                    .args(["convert", "-c", "-O", "qcow2", "-o", &options])
                    .args([&raw, &qcow2])
                    .status()
                    .unwrap();
                assert!(status.success());
                let image = fs::read(&qcow2).unwrap();
                let clusters = clusters_of(&image, &File::open(&qcow2).unwrap());
                assert!(clusters.concat() == contents);
            }
        }
    }
}
